//! The size of the vocabulary: the embedding table, the head and the config's `vocab_size` grow and shrink together.
//!
//! transformers draws new rows around the mean of the old ones, with a billionth of their covariance; here they are the
//! mean itself, so nothing is drawn.

use super::Model;
use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::ops::ParamStore;
use crate::ops::linear::Matrix;

/// A row whose numbers all lie within this of 0 was never trained: Llama 3 reserves such tokens.
const UNTRAINED: f32 = 1e-16;

/// A token whose rows are to be set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewToken {
    /// Its id.
    pub id: u32,
    /// The tokens that spelled it before it was one.
    pub pieces: Vec<u32>,
}

/// Which of the two matrices with a row for each token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// The embedding table.
    Embedding,
    /// The head.
    Head,
}

impl Which {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Embedding, Self::Head];

    /// Its name.
    pub fn module(self) -> &'static str {
        match self {
            Self::Embedding => "model.embed_tokens",
            Self::Head => "lm_head",
        }
    }
}

/// The most tokens a vocabulary may have; a slip of the keyboard must not eat the memory.
pub const MAX_VOCAB: usize = 1 << 22;

impl Model {
    /// Gives the model a vocabulary of `n` tokens: rows are cut off, or added as the mean of the old ones.
    ///
    /// # Errors
    /// [`Error::Config`] if `n` is 0 or beyond every vocabulary there is.
    pub fn resize_vocab(&mut self, n: usize) -> Result<()> {
        if !(1..=MAX_VOCAB).contains(&n) {
            return Err(Error::config("new_num_tokens", n, format!("expected from 1 to {MAX_VOCAB}")));
        }
        if n == self.config.vocab_size {
            return Ok(());
        }
        for which in Which::ALL {
            if let Some(mut table) = self.table(which) {
                let mean = table.mean(0..table.rows());
                table.resize(n, &mean);
            }
        }
        self.config.vocab_size = n;
        self.config.json["vocab_size"] = n.into();
        self.llama.vocab_size = n;
        self.new_tables = true;
        self.refresh_lm_head_copy()
    }

    /// Sets the rows of new tokens in a vocabulary of `n`, to which it grows if it is smaller: the mean of all trained
    /// rows, `interpolation` of it replaced by the mean of the rows of the token's pieces.
    ///
    /// # Errors
    /// [`Error::Config`] if `interpolation` is not from 0 to 1; [`Error::Data`] for a token or a piece without a row.
    pub fn add_tokens(&mut self, n: usize, tokens: &[NewToken], interpolation: f64) -> Result<()> {
        if !(0.0..=1.0).contains(&interpolation) {
            return Err(Error::config("interpolation", interpolation, "expected a number from 0 to 1"));
        }
        let (old, n) = (self.config.vocab_size, n.max(self.config.vocab_size));
        let lacks_row = |token: &&NewToken| {
            token.id as usize >= n || token.pieces.is_empty() || token.pieces.iter().any(|&piece| piece as usize >= old)
        };
        if let Some(NewToken { id, pieces }) = tokens.iter().find(lacks_row) {
            let problem = format!("token {id}, spelled by {pieces:?}: not all have a row in the model of {old} tokens");
            return Err(Error::data("new_tokens", problem));
        }
        // From before the vocabulary grows, whose new rows are trained by nobody.
        let rows = Which::ALL.map(|which| {
            let table = self.table(which)?;
            let (mean, share) = (table.mean(table.trained()), interpolation as f32);
            let row = |token: &NewToken| {
                let pieces = table.mean(token.pieces.iter().map(|&piece| piece as usize));
                mean.iter().zip(&pieces).map(|(mean, piece)| mean * (1.0 - share) + piece * share).collect()
            };
            Some(tokens.iter().map(row).collect::<Vec<Vec<f32>>>())
        });
        self.resize_vocab(n)?;
        for (which, rows) in Which::ALL.into_iter().zip(rows) {
            let (Some(mut table), Some(rows)) = (self.table(which), rows) else { continue };
            tokens.iter().zip(&rows).for_each(|(token, row)| table.set_row(token.id as usize, row));
        }
        self.new_tables |= !tokens.is_empty();
        self.refresh_lm_head_copy()
    }

    /// Replaces the embedding table or the head by one read elsewhere, rounded as the old one is stored;
    /// values: `[vocab, hidden]`. Does nothing to a head that is the embedding table.
    ///
    /// # Errors
    /// Those of the head's 8-bit copy.
    pub(crate) fn set_table(&mut self, which: Which, values: &[f32]) -> Result<()> {
        let hidden = self.config.hidden_size;
        let Some(mut table) = self.table(which) else { return Ok(()) };
        values.chunks_exact(hidden).enumerate().for_each(|(row, values)| table.set_row(row, values));
        self.new_tables = true;
        self.refresh_lm_head_copy()
    }

    /// The embedding table or the head; `None` for a head that is the embedding table.
    fn table(&mut self, which: Which) -> Option<Table<'_>> {
        let matrix = match which {
            Which::Embedding => Some(&mut self.llama.embed),
            Which::Head => self.llama.head.as_mut(),
        };
        let (params, kernels, hidden) = (&mut self.params, self.ctx.kernels, self.config.hidden_size);
        Some(Table { matrix: matrix?, params, kernels, hidden })
    }
}

/// The embedding table or the head, frozen or trained.
struct Table<'a> {
    matrix: &'a mut Matrix,
    params: &'a mut ParamStore,
    kernels: &'static Kernels,
    hidden: usize,
}

impl Table<'_> {
    fn rows(&self) -> usize {
        match &*self.matrix {
            Matrix::Frozen(weight) => weight.rows(),
            Matrix::Trained(id) => self.params.get(*id).len() / self.hidden,
        }
    }

    /// One row, `[hidden]`.
    fn read(&self, row: usize, out: &mut [f32]) {
        let start = row * self.hidden;
        match &*self.matrix {
            Matrix::Frozen(weight) => weight.read(self.kernels, start, out),
            Matrix::Trained(id) => out.copy_from_slice(&self.params.get(*id)[start..start + self.hidden]),
        }
    }

    /// The mean of some rows, `[hidden]`, summed in f64; zeros for none.
    fn mean(&self, rows: impl Iterator<Item = usize>) -> Vec<f32> {
        let (mut sum, mut row, mut count) = (vec![0.0_f64; self.hidden], vec![0.0; self.hidden], 0_usize);
        for i in rows {
            self.read(i, &mut row);
            sum.iter_mut().zip(&row).for_each(|(sum, &value)| *sum += f64::from(value));
            count += 1;
        }
        sum.iter().map(|sum| (sum / count.max(1) as f64) as f32).collect()
    }

    /// The rows that are not zero.
    fn trained(&self) -> impl Iterator<Item = usize> {
        let mut row = vec![0.0; self.hidden];
        (0..self.rows()).filter(move |&i| {
            self.read(i, &mut row);
            row.iter().any(|value| value.abs() > UNTRAINED)
        })
    }

    fn resize(&mut self, rows: usize, fill: &[f32]) {
        match self.matrix {
            Matrix::Frozen(weight) => weight.resize_rows(self.kernels, rows, fill),
            Matrix::Trained(id) => self.params.resize_rows(*id, rows, fill),
        }
    }

    fn set_row(&mut self, row: usize, values: &[f32]) {
        match self.matrix {
            Matrix::Frozen(weight) => weight.set_row(self.kernels, row, values),
            Matrix::Trained(id) => self.params.set_row(*id, row, values),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::model::testing::{TestShape, random_model, random_tokens};
    use crate::ops::Weight;
    use crate::quant::{FloatKind, Nf4Tensor, RowwiseInt8};
    use half::bf16;

    const VOCAB: usize = 10;
    const HIDDEN: usize = 64;

    /// `[VOCAB, HIDDEN]`, exact in bf16.
    fn values() -> Vec<f32> {
        (0..VOCAB * HIDDEN).map(|i| (i % 37) as f32 - 18.0).collect()
    }

    /// A model whose embedding table is tied, stored as `embed` says.
    fn model(embed: Matrix) -> Model {
        let shape = TestShape { hidden: HIDDEN, ffn: 64, layers: 1, vocab: VOCAB, ..TestShape::wide() };
        let mut model = random_model(shape);
        model.llama.embed = embed;
        model
    }

    /// All rows of a table.
    fn table_of(model: &mut Model, which: Which) -> Vec<Vec<f32>> {
        let table = model.table(which).unwrap();
        let read = |i| {
            let mut row = vec![0.0; HIDDEN];
            table.read(i, &mut row);
            row
        };
        (0..table.rows()).map(read).collect()
    }

    fn f32_table(values: Vec<f32>) -> Matrix {
        Matrix::Frozen(Weight::f32(values, VOCAB, HIDDEN).unwrap())
    }

    #[test]
    fn new_rows_are_the_mean_and_old_ones_stay_in_every_storage() {
        let half: Vec<_> = values().into_iter().map(bf16::from_f32).collect();
        let kernels = crate::kernels::active().unwrap();
        let quantized = Nf4Tensor::quantize(&values(), &[VOCAB, HIDDEN], FloatKind::Bf16, 64, false).unwrap();
        let quantized = Weight::nf4(quantized).unwrap();
        let dequantized = quantized.to_f32(kernels);
        let read = |start: usize, out: &mut [f32]| {
            out.copy_from_slice(&values()[start..start + out.len()]);
            Ok(())
        };
        let eight = Weight::int8(RowwiseInt8::quantize_from(VOCAB, HIDDEN, read).unwrap());
        let of_eight = eight.to_f32(kernels);
        for (stored, embed, old) in [
            ("f32", f32_table(values()), values()),
            ("bf16", Matrix::Frozen(Weight::bf16(half, VOCAB, HIDDEN).unwrap()), values()),
            ("nf4", Matrix::Frozen(quantized), dequantized),
            ("int8", Matrix::Frozen(eight), of_eight),
        ] {
            let mut model = model(embed);
            model.resize_vocab(VOCAB + 3).unwrap();
            let rows = table_of(&mut model, Which::Embedding);
            assert_eq!((rows.len(), rows[..VOCAB].concat() == old), (VOCAB + 3, true), "{stored}");
            for (column, &got) in rows[VOCAB + 2].iter().enumerate() {
                let want = (0..VOCAB).map(|row| old[row * HIDDEN + column]).sum::<f32>() / VOCAB as f32;
                // 2^-8: half a step of bf16; 1e-5: this sum runs in f32, and terms of up to 18 may cancel.
                assert!((got - want).abs() <= want.abs() / 256.0 + 1e-5, "{stored}: {got} against {want}");
            }
            assert_eq!((model.llama.vocab_size, &model.config.json["vocab_size"]), (13, &serde_json::json!(13)));
            // The new ids can be used, and grown rows cut off again.
            let (mut tokens, _) = random_tokens(&[4], VOCAB);
            tokens.ids[3] = 12;
            assert_eq!(model.logits(&tokens).unwrap().len(), 4 * 13, "{stored}");
            model.resize_vocab(VOCAB - 1).unwrap();
            assert_eq!(table_of(&mut model, Which::Embedding).concat(), old[..(VOCAB - 1) * HIDDEN], "{stored}");
            assert!(model.logits(&tokens).unwrap_err().to_string().contains("resize_token_embeddings"), "{stored}");
        }
    }

    #[test]
    fn trained_tables_grow_too() {
        let mut model = model(f32_table(values()));
        let id = model.params.add("model.embed_tokens.weight".into(), vec![VOCAB, HIDDEN], values(), true);
        model.llama.embed = Matrix::Trained(id);
        model.resize_vocab(VOCAB + 2).unwrap();
        let param = model.params.all().last().unwrap();
        assert_eq!((&param.shape[..], param.data.len()), (&[VOCAB + 2, HIDDEN][..], (VOCAB + 2) * HIDDEN));
        assert_eq!(param.data[..VOCAB * HIDDEN], values());
        assert_eq!(param.data[VOCAB * HIDDEN..(VOCAB + 1) * HIDDEN], param.data[(VOCAB + 1) * HIDDEN..]);
    }

    #[test]
    fn new_tokens_lie_between_the_mean_and_their_pieces() {
        // Row 9 was never trained and does not count.
        let mut old = values();
        old[9 * HIDDEN..].fill(0.0);
        let mean = |rows: &[usize], column: usize| {
            rows.iter().map(|row| old[row * HIDDEN + column]).sum::<f32>() / rows.len() as f32
        };
        for share in [0.0, 0.25, 1.0] {
            let mut model = model(f32_table(old.clone()));
            model.llama.head = Some(f32_table(old.iter().map(|v| 2.0 * v).collect()));
            let token = NewToken { id: 11, pieces: vec![2, 5, 5] };
            model.add_tokens(VOCAB + 2, &[token], share).unwrap();
            for (which, factor) in [(Which::Embedding, 1.0), (Which::Head, 2.0)] {
                let rows = table_of(&mut model, which);
                assert_eq!(rows.len(), VOCAB + 2);
                for (column, got) in rows[11].iter().enumerate() {
                    let all = mean(&[0, 1, 2, 3, 4, 5, 6, 7, 8], column);
                    let want = factor * (all + share as f32 * (mean(&[2, 5, 5], column) - all));
                    assert!((got - want).abs() < 1e-5, "{share} {which:?}: {got} against {want}"); // f32 sums up to 36
                }
            }
        }
        let mut model = model(f32_table(old.clone()));
        let refused = |model: &mut Model, id, pieces: &[u32], share| {
            let error = model.add_tokens(11, &[NewToken { id, pieces: pieces.to_vec() }], share).unwrap_err();
            assert_eq!(model.config.vocab_size, VOCAB, "nothing was done");
            error.to_string()
        };
        assert!(refused(&mut model, 10, &[1], 1.5).contains("interpolation = 1.5"));
        assert!(refused(&mut model, 11, &[1], 0.5).contains("token 11"));
        assert!(refused(&mut model, 10, &[1, 10], 0.5).contains("[1, 10]"));
        assert!(refused(&mut model, 10, &[], 0.5).contains("token 10"));
        assert!(model.resize_vocab(0).unwrap_err().to_string().contains("new_num_tokens = 0"));
    }
}
