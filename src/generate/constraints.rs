//! Tokens that must not come next: ends that come too early, sequences that were there before, banned words.
//!
//! The settings mean what they mean in transformers; a banned token's logit becomes minus infinity. Unlike there, padding
//! is never part of a sequence.

use crate::config::generate::Bans;

/// Sets the logits of all banned tokens to minus infinity.
///
/// logits: `[vocab]`, seen: prompt and new tokens so far, n_new: the new ones among them, eos: tokens that end a sequence.
pub fn ban(bans: &Bans, logits: &mut [f32], seen: &[u32], n_new: usize, eos: &[u32]) {
    let mut ban = |id: u32| {
        if let Some(logit) = logits.get_mut(id as usize) {
            *logit = f32::NEG_INFINITY;
        }
    };
    if n_new < bans.min_new_tokens || seen.len() < bans.min_length {
        eos.iter().copied().for_each(&mut ban);
    }
    if let (1.., Some(start)) = (bans.no_repeat_ngram_size, (seen.len() + 1).checked_sub(bans.no_repeat_ngram_size)) {
        let (n, last) = (bans.no_repeat_ngram_size, &seen[start..]);
        seen.windows(n).filter(|window| window[..n - 1] == *last).for_each(|window| ban(window[n - 1]));
    }
    for word in &bans.bad_words_ids {
        // A text may always end: the eos token alone is no word.
        if let Some((&id, before)) = word.split_last()
            && seen.ends_with(before)
            && !(before.is_empty() && eos.contains(&id))
        {
            ban(id);
        }
    }
    bans.suppress_tokens.iter().copied().for_each(&mut ban);
    if n_new == 0 {
        bans.begin_suppress_tokens.iter().copied().for_each(&mut ban);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    const EOS: u32 = 9;

    /// The ids that are banned after `seen`, whose last `n_new` tokens are new.
    fn banned(bans: &Bans, seen: &[u32], n_new: usize) -> Vec<usize> {
        let mut logits = [0.0; 10];
        ban(bans, &mut logits, seen, n_new, &[EOS]);
        logits.iter().enumerate().filter(|(_, logit)| **logit == f32::NEG_INFINITY).map(|(id, _)| id).collect()
    }

    #[test]
    fn nothing_is_banned_unless_asked() {
        assert!(banned(&Bans::default(), &[1, 2, 1, 2], 2).is_empty());
    }

    #[test]
    fn an_end_may_not_come_too_early() {
        let bans = Bans { min_new_tokens: 2, ..Bans::default() };
        assert_eq!((banned(&bans, &[1, 2, 3], 1), banned(&bans, &[1, 2, 3], 2)), (vec![9], vec![]));
        let bans = Bans { min_length: 4, ..Bans::default() };
        assert_eq!((banned(&bans, &[1, 2, 3], 2), banned(&bans, &[1, 2, 3, 4], 3)), (vec![9], vec![]));
    }

    #[test]
    fn what_was_said_is_not_said_again() {
        let bans = |n| Bans { no_repeat_ngram_size: n, ..Bans::default() };
        assert_eq!(banned(&bans(1), &[3, 5, 3], 1), [3, 5]);
        assert_eq!(banned(&bans(2), &[1, 2, 1, 3, 1], 1), [2, 3]);
        assert_eq!(banned(&bans(3), &[1, 2, 4, 1, 2], 1), [4]);
        assert!(banned(&bans(3), &[1, 2], 1).is_empty());
        assert!(banned(&bans(4), &[1], 1).is_empty(), "shorter than what may not be repeated");
    }

    #[test]
    fn banned_words_and_tokens() {
        let bans = Bans { bad_words_ids: vec![vec![7], vec![1, 2, 8]], ..Bans::default() };
        assert_eq!((banned(&bans, &[1, 2], 1), banned(&bans, &[2, 1], 1)), (vec![7, 8], vec![7]));
        let bans = Bans { bad_words_ids: vec![vec![EOS], vec![1, EOS]], ..Bans::default() };
        assert_eq!((banned(&bans, &[2], 1), banned(&bans, &[1], 1)), (vec![], vec![9]));
        let bans = Bans { suppress_tokens: vec![4, 400], begin_suppress_tokens: vec![5], ..Bans::default() };
        assert_eq!((banned(&bans, &[1], 0), banned(&bans, &[1], 1)), (vec![4, 5], vec![4]));
    }
}
