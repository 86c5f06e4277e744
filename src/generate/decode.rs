//! The decode loop: prefill all prompts at once, then one token a sequence and step, with a KV cache.
//!
//! Prompts of different lengths stand one after the other without padding, so a sequence's tokens do not depend on its
//! neighbours. A finished sequence takes no more work.

use crate::error::{Error, Result};
use crate::model::{KvCache, Model};
use crate::ops::Tokens;

/// What the caller decides at each token.
pub trait Chooser {
    /// The next token of sequence `seq`;  ids: prompt and new tokens so far, logits: `[vocab]`, may be changed.
    fn choose(&mut self, seq: usize, ids: &[u32], n_new: usize, logits: &mut [f32]) -> u32;

    /// Hears of the token that was chosen; says whether the sequence ends with it.
    ///
    /// # Errors
    /// Any error ends the generation.
    fn accept(&mut self, seq: usize, token: u32, new_ids: &[u32]) -> Result<bool>;
}

/// Continues each prompt by at most `max_new_tokens`; returns the new ids.
///
/// # Errors
/// [`Error::Data`] for an empty prompt or an id outside the vocabulary; what `chooser` and `poll` return.
pub fn decode(
    model: &Model,
    prompts: &[Vec<u32>],
    max_new_tokens: usize,
    chooser: &mut (dyn Chooser + Send),
    poll: &(dyn Fn() -> Result<()> + Sync),
) -> Result<Vec<Vec<u32>>> {
    for (seq, prompt) in prompts.iter().enumerate() {
        if prompt.is_empty() {
            return Err(Error::data(
                format!("prompt {seq}"),
                "has no tokens; a prompt needs at least one (such as BOS)",
            ));
        }
        model.check_ids(prompt)?;
    }
    let config = &model.config;
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0) + max_new_tokens;
    let mut cache = KvCache::new(config.num_layers, prompts.len(), longest, config.num_kv_heads * config.head_dim);
    let mut ids = prompts.to_vec();
    let mut done = vec![max_new_tokens == 0; prompts.len()];
    // What each sequence feeds the model next: first its prompt, then its last token, nothing once it is done.
    let mut next: Vec<Vec<u32>> = prompts.to_vec();
    let mut n_new = 0;
    while done.iter().any(|done| !done) {
        poll()?;
        let tokens = feed(&next, &cache);
        let env = model.env(&tokens);
        let hidden = model.llama.forward(&env, Some(&mut cache));
        let active: Vec<usize> = (0..ids.len()).filter(|&seq| !done[seq]).collect();
        // Only the last token of each active sequence needs logits.
        let width = config.hidden_size;
        let mut last = model.ctx.buf(active.len() * width);
        for (row, &seq) in last.chunks_exact_mut(width).zip(&active) {
            let at = tokens.cu_seqlens[seq + 1] - 1;
            row.copy_from_slice(&hidden[at * width..(at + 1) * width]);
        }
        let mut logits = model.llama.logits(&env, &last);
        for (logits, &seq) in logits.chunks_exact_mut(config.vocab_size).zip(&active) {
            let token = chooser.choose(seq, &ids[seq], n_new, logits);
            ids[seq].push(token);
            done[seq] = chooser.accept(seq, token, &ids[seq][prompts[seq].len()..])? || n_new + 1 == max_new_tokens;
        }
        for (seq, next) in next.iter_mut().enumerate() {
            next.clear();
            if !done[seq] {
                next.extend(ids[seq].last());
            }
        }
        n_new += 1;
    }
    Ok(ids.iter().zip(prompts).map(|(ids, prompt)| ids[prompt.len()..].to_vec()).collect())
}

/// The next tokens of all sequences as one batch, at their positions.
fn feed(next: &[Vec<u32>], cache: &KvCache) -> Tokens {
    let mut tokens = Tokens::from_sequences(next.iter().map(|ids| &ids[..]));
    for (seq, pair) in tokens.cu_seqlens.windows(2).enumerate() {
        for position in &mut tokens.positions[pair[0]..pair[1]] {
            *position += cache.len(seq) as u32;
        }
    }
    tokens
}
