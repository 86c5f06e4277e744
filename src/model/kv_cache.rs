//! Keys and values of the tokens a model has already seen, one growing pair of buffers per layer and sequence.

use crate::ops::Tokens;
use crate::ops::attention::Segment;

/// The cache of a batch of sequences.
pub struct KvCache {
    layers: Vec<LayerCache>,
    lengths: Vec<usize>,
}

/// One layer's keys and values of every sequence, `[length, kv_heads · head_dim]` each, already rotated.
pub struct LayerCache {
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
    /// Floats a buffer never needs more than.
    most: usize,
}

/// Tokens by which a buffer grows at least.
const GROWTH: usize = 256;

impl KvCache {
    /// An empty cache for `n_seqs` sequences of at most `max_len` tokens; it grows with them, by half each time.
    pub fn new(n_layers: usize, n_seqs: usize, max_len: usize, kv_width: usize) -> Self {
        let buffers = || vec![Vec::new(); n_seqs];
        let layer = |_| LayerCache { keys: buffers(), values: buffers(), most: max_len.saturating_mul(kv_width) };
        Self { layers: (0..n_layers).map(layer).collect(), lengths: vec![0; n_seqs] }
    }

    /// Number of sequences.
    pub fn n_seqs(&self) -> usize {
        self.lengths.len()
    }

    /// Tokens of sequence `seq` seen so far.
    pub fn len(&self, seq: usize) -> usize {
        self.lengths[seq]
    }

    /// Whether no sequence has a token yet.
    pub fn is_empty(&self) -> bool {
        self.lengths.iter().all(|&len| len == 0)
    }

    /// One layer's part.
    pub fn layer(&mut self, layer_idx: usize) -> &mut LayerCache {
        &mut self.layers[layer_idx]
    }

    /// Counts the tokens of a finished forward.
    pub fn advance(&mut self, tokens: &Tokens) {
        for (length, pair) in self.lengths.iter_mut().zip(tokens.cu_seqlens.windows(2)) {
            *length += pair[1] - pair[0];
        }
    }
}

impl LayerCache {
    /// Appends the new tokens' keys and values, `[n_tokens, kv_width]`.
    pub fn append(&mut self, cu_seqlens: &[usize], kv_width: usize, k: &[f32], v: &[f32]) {
        for (seq, pair) in cu_seqlens.windows(2).enumerate() {
            let rows = pair[0] * kv_width..pair[1] * kv_width;
            for (buffer, new) in [(&mut self.keys[seq], &k[rows.clone()]), (&mut self.values[seq], &v[rows])] {
                let needed = buffer.len() + new.len();
                if needed > buffer.capacity() {
                    let grown = (buffer.len() + buffer.len() / 2).max(needed + GROWTH * kv_width);
                    buffer.reserve_exact(grown.min(self.most).max(needed) - buffer.len());
                }
                buffer.extend_from_slice(new);
            }
        }
    }

    /// The segments of the new tokens against everything their sequence has seen.
    pub fn segments(&self, cu_seqlens: &[usize], kv_width: usize) -> Vec<Segment<'_>> {
        cu_seqlens
            .windows(2)
            .enumerate()
            .map(|(seq, pair)| Segment {
                q_start: pair[0],
                q_len: pair[1] - pair[0],
                k: &self.keys[seq],
                v: &self.values[seq],
                kv_len: self.keys[seq].len() / kv_width,
            })
            .collect()
    }
}
