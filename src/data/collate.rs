//! From tokenised rows to one training batch: rows end to end, without padding.

use super::rows::{Example, IGNORE};

/// Several rows end to end; the boundaries are in `cu_seqlens`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Batch {
    /// Token ids, `[n_tokens]`.
    pub input_ids: Vec<u32>,
    /// What each token's logits are scored against, `[n_tokens]`: the label of the *next* token of the same row, or
    /// [`IGNORE`] (the last token of a row has none).
    pub targets: Vec<i32>,
    /// Position inside the row, from 0, `[n_tokens]`.
    pub positions: Vec<u32>,
    /// The dataset row each token belongs to, `[n_tokens]`; keys the counter-based randomness.
    pub row_ids: Vec<u32>,
    /// Where each row starts, and the end of the last: `[n_rows + 1]`, first 0, last `n_tokens`.
    pub cu_seqlens: Vec<usize>,
}

impl Batch {
    /// How many tokens have a target: the denominator of the loss.
    pub fn n_trained(&self) -> usize {
        self.targets.iter().filter(|&&target| target != IGNORE).count()
    }

    /// How many tokens there are.
    pub fn n_tokens(&self) -> usize {
        self.input_ids.len()
    }
}

/// Puts `rows` (each with its index in the dataset) end to end and shifts the labels by one.
pub fn collate(rows: &[(&Example, u32)]) -> Batch {
    let n_tokens = rows.iter().map(|(row, _)| row.input_ids.len()).sum();
    let mut batch = Batch {
        input_ids: Vec::with_capacity(n_tokens),
        targets: Vec::with_capacity(n_tokens),
        positions: Vec::with_capacity(n_tokens),
        row_ids: Vec::with_capacity(n_tokens),
        cu_seqlens: Vec::with_capacity(rows.len() + 1),
    };
    batch.cu_seqlens.push(0);
    for (row, row_id) in rows {
        let len = row.input_ids.len();
        batch.input_ids.extend_from_slice(&row.input_ids);
        batch.targets.extend(row.labels.iter().skip(1));
        if len > 0 {
            batch.targets.push(IGNORE);
        }
        batch.positions.extend(0..len as u32);
        batch.row_ids.extend(std::iter::repeat_n(row_id, len));
        batch.cu_seqlens.push(batch.input_ids.len());
    }
    batch
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn labels_are_shifted_inside_each_row() {
        let a = Example { input_ids: vec![5, 6, 7], labels: vec![IGNORE, 6, 7] };
        let b = Example { input_ids: vec![8], labels: vec![8] };
        let c = Example { input_ids: vec![9, 10], labels: vec![9, 10] };
        let batch = collate(&[(&a, 4), (&b, 0), (&c, 9)]);
        assert_eq!(batch.input_ids, [5, 6, 7, 8, 9, 10]);
        assert_eq!(batch.targets, [6, 7, IGNORE, IGNORE, 10, IGNORE]);
        assert_eq!(batch.positions, [0, 1, 2, 0, 0, 1]);
        assert_eq!(batch.row_ids, [4, 4, 4, 0, 9, 9]);
        assert_eq!(batch.cu_seqlens, [0, 3, 4, 6]);
        assert_eq!(batch.n_trained(), 3);
    }

    proptest! {
        #[test]
        fn nothing_is_lost_and_no_row_sees_its_neighbour(lengths in prop::collection::vec(0usize..9, 0..6)) {
            let rows: Vec<Example> = lengths.iter().enumerate().map(|(i, &len)| {
                let input_ids: Vec<u32> = (0..len as u32).map(|t| 100 * i as u32 + t).collect();
                let labels = input_ids.iter().map(|&id| id as i32).collect();
                Example { input_ids, labels }
            }).collect();
            let pairs: Vec<(&Example, u32)> = rows.iter().zip(0..).collect();
            let batch = collate(&pairs);
            prop_assert_eq!(batch.n_tokens(), lengths.iter().sum::<usize>());
            prop_assert_eq!(batch.cu_seqlens.len(), lengths.len() + 1);
            prop_assert_eq!(batch.targets.len(), batch.n_tokens());
            for (t, &target) in batch.targets.iter().enumerate() {
                let last = batch.cu_seqlens.contains(&(t + 1));
                let expected = if last { IGNORE } else { batch.input_ids[t + 1] as i32 };
                prop_assert_eq!(target, expected);
                prop_assert_eq!(batch.row_ids[t], batch.input_ids[t] / 100);
            }
        }
    }
}
