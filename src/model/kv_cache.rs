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
}

impl KvCache {
    /// An empty cache for `n_seqs` sequences of at most `max_len` tokens, allocated once.
    pub fn new(n_layers: usize, n_seqs: usize, max_len: usize, kv_width: usize) -> Self {
        let buffers = || (0..n_seqs).map(|_| Vec::with_capacity(max_len * kv_width)).collect::<Vec<_>>();
        let layers = (0..n_layers).map(|_| LayerCache { keys: buffers(), values: buffers() }).collect();
        Self { layers, lengths: vec![0; n_seqs] }
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
            self.keys[seq].extend_from_slice(&k[rows.clone()]);
            self.values[seq].extend_from_slice(&v[rows]);
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
