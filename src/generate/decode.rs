//! The decode loop: prefill all prompts in chunks, then one token a sequence and step, with a KV cache.
//!
//! Prompts of different lengths stand one after the other without padding, so a sequence's tokens do not depend on its
//! neighbours. A finished sequence takes no more work. Up to [`MAX_ROWS`] tokens at a time
//! read the packed weights where they are.

use crate::error::{Error, Result};
use crate::model::{KvCache, Model};
use crate::ops::crew::with_crew;
use crate::ops::gemv::MAX_ROWS;
use crate::ops::{Buf, Ctx, Env, Precision, Tokens};

/// Tokens of prompts that go through the model at a time.
const PREFILL_TOKENS: usize = 512;

/// What the caller decides at each token.
pub trait Chooser {
    /// The next token of sequence `seq`;  ids: prompt and new tokens so far, logits: `[vocab]`, may be changed.
    fn choose(&mut self, seq: usize, ids: &[u32], n_new: usize, logits: &mut [f32]) -> u32;

    /// Hears of the token that was chosen; says whether the sequence ends with it.
    ///
    /// # Errors
    /// Any error ends the generation.
    fn accept(&mut self, seq: usize, token: u32, new_ids: &[u32]) -> Result<bool>;

    /// Hears of a finished step, with the new token of each sequence that was not over before; says which sequences end
    /// with it, by an empty list if none does.
    ///
    /// # Errors
    /// Any error ends the generation.
    fn stepped(&mut self, tokens: &[Option<u32>]) -> Result<Vec<bool>> {
        let _ = tokens;
        Ok(Vec::new())
    }
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
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0).saturating_add(max_new_tokens);
    let mut cache = KvCache::new(config.num_layers, prompts.len(), longest, config.num_kv_heads * config.head_dim);
    let mut ids = prompts.to_vec();
    for ids in &mut ids {
        // What may be asked for is more than there is memory; most texts end before.
        ids.reserve(max_new_tokens.min(PREFILL_TOKENS));
    }
    let mut done = vec![max_new_tokens == 0; prompts.len()];
    let mut tokens = Tokens::default();
    let mut n_new = 0;
    while done.iter().any(|done| !done) {
        poll()?;
        let active = (0..ids.len()).filter(|&seq| !done[seq]);
        let mut logits = if n_new == 0 {
            prefill(model, prompts, &mut cache, poll)?
        } else {
            // Each active sequence feeds its last token.
            feed(&mut tokens, &cache, |seq| if done[seq] { &[] } else { &ids[seq][ids[seq].len() - 1..] });
            next(model, &tokens, &mut cache)
        };
        let mut finished = Vec::new();
        let mut new = vec![None; ids.len()];
        for (logits, seq) in logits.chunks_exact_mut(config.vocab_size).zip(active) {
            let token = chooser.choose(seq, &ids[seq], n_new, logits);
            ids[seq].push(token);
            new[seq] = Some(token);
            if chooser.accept(seq, token, &ids[seq][prompts[seq].len()..])? || n_new + 1 == max_new_tokens {
                finished.push(seq);
            }
        }
        for seq in finished {
            done[seq] = true;
        }
        for (done, ends) in done.iter_mut().zip(chooser.stepped(&new)?) {
            *done |= ends;
        }
        n_new += 1;
    }
    Ok(ids.iter().zip(prompts).map(|(ids, prompt)| ids[prompt.len()..].to_vec()).collect())
}

/// Runs the prompts, one after the other and at most [`PREFILL_TOKENS`] tokens at a time, so that a long prompt takes no more
/// memory than a chunk. Returns the logits of each prompt's last token, `[n_prompts, vocab]`.
fn prefill(
    model: &Model,
    prompts: &[Vec<u32>],
    cache: &mut KvCache,
    poll: &(dyn Fn() -> Result<()> + Sync),
) -> Result<Buf> {
    let width = model.config.hidden_size;
    let mut last = model.ctx.buf(prompts.len() * width);
    let mut tokens = Tokens::default();
    let mut fed = vec![0; prompts.len()];
    while fed.iter().zip(prompts).any(|(&fed, prompt)| fed < prompt.len()) {
        poll()?;
        let mut room = PREFILL_TOKENS;
        let ends: Vec<usize> = fed
            .iter()
            .zip(prompts)
            .map(|(&fed, prompt)| {
                let take = room.min(prompt.len() - fed);
                room -= take;
                fed + take
            })
            .collect();
        feed(&mut tokens, cache, |seq| &prompts[seq][fed[seq]..ends[seq]]);
        let hidden = hidden(model, &tokens, cache);
        for (seq, row) in last.chunks_exact_mut(width).enumerate() {
            if fed[seq] < ends[seq] {
                let at = tokens.cu_seqlens[seq + 1] - 1;
                row.copy_from_slice(&hidden[at * width..(at + 1) * width]);
            }
        }
        fed = ends;
    }
    Ok(with_crew(|crew| model.next_logits(&model.generation_env(&tokens), crew, &last)))
}

/// The logits of each new token, `[n_tokens, vocab]`; never in 16-bit blocks.
fn next(model: &Model, tokens: &Tokens, cache: &mut KvCache) -> Buf {
    let env = model.generation_env(tokens);
    if tokens.len() > MAX_ROWS {
        // At least as exact as a few tokens would be, which may be rounded to 16 bits with a finer scale.
        let precision = if model.ctx.precision == Precision::Int16 { Precision::F32 } else { model.ctx.precision };
        let ctx = Ctx { precision, ..model.ctx.clone() };
        let hidden = model.llama.forward(&Env { ctx: &ctx, ..env }, Some(cache));
        return with_crew(|crew| model.next_logits(&env, crew, &hidden));
    }
    // One crew for the whole token.
    with_crew(|crew| {
        let hidden = model.llama.decode(&env, crew, cache);
        model.next_logits(&env, crew, &hidden)
    })
}

/// Hidden states of a prompt's tokens, `[n_tokens, hidden]`: few read the weights where they are stored, many go through the GEMMs,
/// whose loops are rayon's, so no crew may wait beside them.
fn hidden(model: &Model, tokens: &Tokens, cache: &mut KvCache) -> Buf {
    let env = model.generation_env(tokens);
    // A short prompt is rounded as a long one is: neighbours change nothing.
    if tokens.len() > MAX_ROWS || model.few_differ_from_many() {
        return model.llama.forward(&env, Some(cache));
    }
    with_crew(|crew| model.llama.decode(&env, crew, cache))
}

/// The next tokens of all sequences as one batch, at their positions.
fn feed<'a>(tokens: &mut Tokens, cache: &KvCache, next: impl Fn(usize) -> &'a [u32]) {
    let Tokens { ids, positions, rows, cu_seqlens } = tokens;
    ids.clear();
    positions.clear();
    rows.clear();
    cu_seqlens.clear();
    cu_seqlens.push(0);
    for seq in 0..cache.n_seqs() {
        let (new, seen) = (next(seq), cache.len(seq) as u32);
        ids.extend_from_slice(new);
        positions.extend(seen..seen + new.len() as u32);
        rows.extend(new.iter().map(|_| seq as u32));
        cu_seqlens.push(ids.len());
    }
}
