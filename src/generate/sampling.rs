//! From logits to the next token, and from streamed text to the stop strings in it.
//!
//! The settings mean what they mean in transformers, applied in its order: repetition penalty, temperature, top-k, top-p,
//! min-p. The choice is counter-based: it depends on the seed, the sequence and the position, not on what was drawn before.

use crate::config::generate::Sampling;
use crate::kernels::philox::philox4x32_10;

/// The fourth word of the counter, which keeps these draws apart from every other use of a seed.
const DOMAIN: u32 = 0x5341_4d50;

/// A token that may be chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Candidate {
    /// Its logit after penalty and temperature; later its weight relative to the likeliest.
    weight: f32,
    id: u32,
}

/// Which draw of a generation this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Draw {
    /// Which sequence of the batch, counted with `num_return_sequences`.
    pub sequence: u32,
    /// Tokens of that sequence before this one, prompt included.
    pub position: u32,
}

/// Chooses tokens; keeps its scratch, so that a token costs no allocation after the first.
#[derive(Debug)]
pub struct Sampler {
    sampling: Option<Sampling>,
    repetition_penalty: f32,
    seed: u64,
    candidates: Vec<Candidate>,
    /// For each token, the call in which it was last penalised.
    penalised: Vec<u32>,
    call: u32,
}

impl Sampler {
    /// A sampler; `sampling: None` takes the likeliest token.
    pub fn new(sampling: Option<Sampling>, repetition_penalty: f32, seed: u64) -> Self {
        Self { sampling, repetition_penalty, seed, candidates: Vec::new(), penalised: Vec::new(), call: 0 }
    }

    /// The next token of a sequence.
    ///
    /// `logits: [vocab]` of the last position, overwritten by the penalty; `seen`: all tokens of the sequence so far, in
    /// any order and number. A logit that is NaN is never chosen.
    pub fn choose(&mut self, logits: &mut [f32], seen: &[u32], draw: Draw) -> u32 {
        self.penalise(logits, seen);
        let Some(sampling) = self.sampling else { return argmax(logits) };
        self.filter(logits, &sampling);
        let total: f64 = self.candidates.iter().map(|c| f64::from(c.weight)).sum();
        if !(total.is_finite() && total > 0.0) {
            return argmax(logits);
        }
        let key = [self.seed as u32, (self.seed >> 32) as u32];
        let words = philox4x32_10([draw.position, draw.sequence, 0, DOMAIN], key);
        let mut left = unit_f64(words) * total;
        for candidate in &self.candidates {
            left -= f64::from(candidate.weight);
            if left < 0.0 {
                return candidate.id;
            }
        }
        // Rounding used up the last bit: the last token that can be drawn at all.
        self.candidates.iter().rfind(|c| c.weight > 0.0).map_or(0, |c| c.id)
    }

    /// Makes tokens that were there before less likely, each once.  Keskar et al. 2019, equation 2, as transformers has it.
    fn penalise(&mut self, logits: &mut [f32], seen: &[u32]) {
        let penalty = self.repetition_penalty;
        if penalty == 1.0 {
            return;
        }
        if self.penalised.len() != logits.len() || self.call == u32::MAX {
            self.penalised.clear();
            self.penalised.resize(logits.len(), 0);
            self.call = 0;
        }
        self.call += 1;
        for &id in seen {
            let (Some(logit), Some(last)) = (logits.get_mut(id as usize), self.penalised.get_mut(id as usize)) else {
                continue;
            };
            if *last != self.call {
                *last = self.call;
                *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
            }
        }
    }

    /// Leaves in `candidates` the tokens that may be chosen, with weights relative to the likeliest.
    fn filter(&mut self, logits: &[f32], sampling: &Sampling) {
        let candidates = &mut self.candidates;
        candidates.clear();
        candidates.extend(
            logits
                .iter()
                .enumerate()
                .filter(|(_, logit)| !logit.is_nan())
                .map(|(id, logit)| Candidate { weight: logit / sampling.temperature, id: id as u32 }),
        );
        // Top-k keeps whatever ties with the k-th.
        let by_weight = |a: &Candidate, b: &Candidate| b.weight.total_cmp(&a.weight).then(a.id.cmp(&b.id));
        if (1..candidates.len()).contains(&sampling.top_k) {
            let (_, kth, _) = candidates.select_nth_unstable_by(sampling.top_k - 1, by_weight);
            let least = kth.weight;
            candidates.retain(|c| c.weight >= least);
        }
        // From here on the order matters to the draw; sorted, it does not depend on how the selection shuffled.
        if sampling.top_p < 1.0 || sampling.top_k > 0 {
            candidates.sort_unstable_by(by_weight);
        }
        let likeliest = candidates.iter().map(|c| c.weight).fold(f32::NEG_INFINITY, f32::max);
        for candidate in candidates.iter_mut() {
            candidate.weight = (candidate.weight - likeliest).exp();
        }
        if sampling.top_p < 1.0 {
            // Drop the unlikeliest while they together have at most 1 - top_p; the likeliest always stays.
            let total: f64 = candidates.iter().map(|c| f64::from(c.weight)).sum();
            let spare = (1.0 - f64::from(sampling.top_p)) * total;
            let mut tail = 0.0;
            let dropped = candidates
                .iter()
                .rev()
                .take_while(|c| {
                    tail += f64::from(c.weight);
                    tail <= spare
                })
                .count();
            candidates.truncate((candidates.len() - dropped).max(1));
        }
        if sampling.min_p > 0.0 {
            candidates.retain(|c| c.weight >= sampling.min_p);
        }
    }
}

/// The first of the largest logits; NaN is never the largest.
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    let mut largest = f32::NEG_INFINITY;
    for (id, &logit) in logits.iter().enumerate() {
        if logit > largest {
            (best, largest) = (id, logit);
        }
    }
    best as u32
}

/// A number in [0, 1) with 53 random bits.
fn unit_f64(words: [u32; 4]) -> f64 {
    let bits = u64::from(words[0]) << 32 | u64::from(words[1]);
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// Finds the first stop string in text that arrives in pieces.
///
/// Text that may still turn out to be the beginning of a stop string is held back.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    stops: Vec<String>,
    held: String,
    stopped: bool,
}

impl StopMatcher {
    /// A matcher; empty stop strings are left out.
    pub fn new(stops: impl IntoIterator<Item = String>) -> Self {
        let stops = stops.into_iter().filter(|stop| !stop.is_empty()).collect();
        Self { stops, held: String::new(), stopped: false }
    }

    /// Takes the next piece and appends to `out` what can be shown; true once a stop string was found.
    ///
    /// Neither the stop string nor anything after it is ever shown.
    pub fn push(&mut self, piece: &str, out: &mut String) -> bool {
        if self.stopped {
            return true;
        }
        self.held.push_str(piece);
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            out.push_str(&self.held[..at]);
            self.held.clear();
            self.stopped = true;
            return true;
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let shown = self.held.len() - keep;
        out.push_str(&self.held[..shown]);
        self.held.drain(..shown);
        false
    }

    /// Appends to `out` what was held back, at the end of the text.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }
}

/// Bytes of the longest end of `text` that is a beginning of `stop`, but not all of it.
fn overlap(text: &str, stop: &str) -> usize {
    let mut lengths = (1..stop.len()).rev().filter(|&len| stop.is_char_boundary(len));
    lengths.find(|&len| text.ends_with(&stop[..len])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use proptest::prelude::*;

    const OFF: Sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 };

    fn at(position: u32) -> Draw {
        Draw { sequence: 0, position }
    }

    /// transformers' warpers, one after the other, on whole vectors in f64: the probabilities of all tokens.
    fn twin(logits: &[f32], sampling: &Sampling) -> Vec<f64> {
        let softmax = |scores: &[f64]| {
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let exps: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
            let sum: f64 = exps.iter().sum();
            exps.into_iter().map(|e| e / sum).collect::<Vec<_>>()
        };
        let mut scores: Vec<f64> = logits.iter().map(|l| f64::from(l / sampling.temperature)).collect();
        if sampling.top_k > 0 {
            let mut sorted = scores.clone();
            sorted.sort_by(|a, b| b.total_cmp(a));
            let kth = sorted[sampling.top_k.min(sorted.len()) - 1];
            scores.iter_mut().filter(|s| **s < kth).for_each(|s| *s = f64::NEG_INFINITY);
        }
        if sampling.top_p < 1.0 {
            let probs = softmax(&scores);
            let mut ascending: Vec<usize> = (0..scores.len()).collect();
            // Of equal ones the later is dropped first, as in the sorted candidates.
            ascending.sort_by(|&a, &b| probs[a].total_cmp(&probs[b]).then(b.cmp(&a)));
            let mut cumulative = 0.0;
            for &id in &ascending[..scores.len() - 1] {
                cumulative += probs[id];
                if cumulative <= 1.0 - f64::from(sampling.top_p) {
                    scores[id] = f64::NEG_INFINITY;
                }
            }
        }
        if sampling.min_p > 0.0 {
            let probs = softmax(&scores);
            let top = probs.iter().copied().fold(0.0, f64::max);
            for (score, p) in scores.iter_mut().zip(&probs) {
                if *p < f64::from(sampling.min_p) * top {
                    *score = f64::NEG_INFINITY;
                }
            }
        }
        softmax(&scores)
    }

    proptest! {
        #[test]
        fn weights_equal_the_twin(
            logits in proptest::collection::vec(-8f32..8.0, 1..200),
            temperature in 0.2f32..2.0,
            top_k in 0usize..60,
            top_p in prop_oneof![Just(1f32), 0.05f32..1.0],
            min_p in prop_oneof![Just(0f32), 0.01f32..0.5],
        ) {
            let sampling = Sampling { temperature, top_k, top_p, min_p };
            let mut sampler = Sampler::new(Some(sampling), 1.0, 1);
            sampler.filter(&logits, &sampling);
            let total: f64 = sampler.candidates.iter().map(|c| f64::from(c.weight)).sum();
            let mut got = vec![0.0; logits.len()];
            for c in &sampler.candidates {
                got[c.id as usize] = f64::from(c.weight) / total;
            }
            let want = twin(&logits, &sampling);
            // A token at the very edge of top-p or min-p may fall on either side in f32; then all shares move with it.
            let other = got.iter().zip(&want).filter(|(a, b)| (**a > 0.0) != (**b > 0.0)).count();
            prop_assert!(other <= usize::from(top_p < 1.0 || min_p > 0.0), "{other} tokens differ");
            if other == 0 {
                for (a, b) in got.iter().zip(&want) {
                    prop_assert!((a - b).abs() < 1e-5, "{a} {b}"); // f32 exponentials
                }
            }
        }
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let logits = [1.0f32, 0.0, -1.0, 2.0, 0.5, -0.5, 1.5, -2.0];
        let want = twin(&logits, &OFF);
        let mut sampler = Sampler::new(Some(OFF), 1.0, 12);
        let draws = 40_000;
        let mut counts = [0f64; 8];
        for position in 0..draws {
            counts[sampler.choose(&mut logits.clone(), &[], at(position)) as usize] += 1.0;
        }
        let n = f64::from(draws);
        let chi2: f64 = counts.iter().zip(&want).map(|(c, p)| (c - n * p).powi(2) / (n * p)).sum();
        // 7 degrees of freedom: 24.3 is exceeded once in a thousand seeds, and this seed is fixed.
        assert!(chi2 < 24.3, "chi-square {chi2}");
    }

    #[test]
    fn the_same_draw_gives_the_same_token_whatever_came_before() {
        let logits: Vec<f32> = (0..50).map(|i| (i as f32 * 0.7).sin()).collect();
        let choose = |sampler: &mut Sampler, draw| sampler.choose(&mut logits.clone(), &[], draw);
        let mut first = Sampler::new(Some(OFF), 1.0, 7);
        let all: Vec<u32> = (0..64).map(|position| choose(&mut first, at(position))).collect();
        let mut second = Sampler::new(Some(OFF), 1.0, 7);
        let backwards: Vec<u32> = (0..64).rev().map(|position| choose(&mut second, at(position))).collect();
        assert!(all.iter().eq(backwards.iter().rev()));
        let differ = |draw: fn(u32) -> Draw, seed| {
            let mut sampler = Sampler::new(Some(OFF), 1.0, seed);
            (0..64).filter(|&p| choose(&mut sampler, draw(p)) != all[p as usize]).count()
        };
        assert!(differ(at, 8) > 32 && differ(at, 7 + (1 << 32)) > 32);
        assert!(differ(|position| Draw { sequence: 1, position }, 7) > 32);
        assert_eq!(differ(at, 7), 0);
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        let mut sampler = Sampler::new(None, 1.0, 0);
        assert_eq!(sampler.choose(&mut [0.0, 3.0, 1.0, 3.0], &[], at(0)), 1);
        assert_eq!(argmax(&[f32::NAN, -5.0, f32::NAN, -4.0]), 3);
        assert_eq!(argmax(&[f32::NEG_INFINITY; 3]), 0);
        // A peak of probability 1 is drawn whatever the number.
        let mut peaked = Sampler::new(Some(Sampling { temperature: 1e-3, ..OFF }), 1.0, 5);
        assert!((0..100).all(|p| peaked.choose(&mut [0.0, 3.0, 1.0, 2.9], &[], at(p)) == 1));
        let mut broken = Sampler::new(Some(Sampling { top_k: 2, ..OFF }), 1.0, 5);
        assert!((0..100).all(|p| broken.choose(&mut [f32::NAN, 0.0, f32::NEG_INFINITY], &[], at(p)) == 1));
        assert_eq!(broken.choose(&mut [f32::NAN; 3], &[], at(0)), 0);
    }

    #[test]
    fn top_k_keeps_ties() {
        let sampling = Sampling { top_k: 2, ..OFF };
        let mut sampler = Sampler::new(Some(sampling), 1.0, 3);
        sampler.filter(&[1.0, 2.0, 1.0, 0.0, 1.0], &sampling);
        assert_eq!(sampler.candidates.iter().map(|c| c.id).collect::<Vec<_>>(), [1, 0, 2, 4]);
    }

    #[test]
    fn repetition_is_penalised_once_a_token() {
        let mut sampler = Sampler::new(None, 2.0, 0);
        let mut logits = [4.0f32, -1.0, 3.0, 0.5];
        // Token 0 was seen twice, 1 once, 9 is outside the vocabulary.
        assert_eq!(sampler.choose(&mut logits, &[0, 1, 0, 9], at(3)), 2);
        assert_eq!(logits, [2.0, -2.0, 3.0, 0.5]);
        let mut again = [4.0f32, -1.0, 3.0, 0.5];
        sampler.choose(&mut again, &[2], at(4));
        assert_eq!(again, [4.0, -1.0, 1.5, 0.5]);
    }

    #[test]
    fn nothing_is_allocated_after_the_first_token() {
        let mut sampler = Sampler::new(Some(Sampling { top_k: 10, top_p: 0.9, ..OFF }), 1.1, 1);
        let logits: Vec<f32> = (0..500).map(|i| (i as f32).cos()).collect();
        sampler.choose(&mut logits.clone(), &[1, 2], at(0));
        let before = (sampler.candidates.as_ptr(), sampler.candidates.capacity(), sampler.penalised.as_ptr());
        for position in 1..50 {
            sampler.choose(&mut logits.clone(), &[position, 2], at(position));
        }
        assert_eq!((sampler.candidates.as_ptr(), sampler.candidates.capacity(), sampler.penalised.as_ptr()), before);
    }

    fn stream(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let mut matcher = StopMatcher::new(stops.iter().map(|s| (*s).to_owned()));
        let mut out = String::new();
        let stopped = pieces.iter().any(|piece| matcher.push(piece, &mut out));
        matcher.finish(&mut out);
        (out, stopped)
    }

    #[test]
    fn stop_strings_are_found_across_pieces() {
        assert_eq!(stream(&["</s>"], &["a<", "/s", ">b"]), ("a".into(), true));
        assert_eq!(stream(&["</s>"], &["a<", "/t", ">b"]), ("a</t>b".into(), false));
        assert_eq!(stream(&["aab"], &["a", "a", "a", "b"]), ("a".into(), true));
        assert_eq!(stream(&["xyz", "b"], &["abxyz"]), ("a".into(), true));
        assert_eq!(stream(&["ébé"], &["caf", "é", "b", "ée"]), ("caf".into(), true));
        assert_eq!(stream(&["\n\n"], &["end\n"]), ("end\n".into(), false));
        assert_eq!(stream(&[""], &["all"]), ("all".into(), false));
        let mut matcher = StopMatcher::new(["!".to_owned()]);
        let mut out = String::new();
        assert!(matcher.push("a!", &mut out) && matcher.push("more", &mut out));
        matcher.finish(&mut out);
        assert_eq!(out, "a");
    }

    proptest! {
        #[test]
        fn streaming_equals_searching_the_whole(
            pieces in proptest::collection::vec("[abé]{0,4}", 0..12),
            stops in proptest::collection::vec("[abé]{1,4}", 0..3),
        ) {
            let whole = pieces.concat();
            let first = stops.iter().filter_map(|stop| whole.find(stop.as_str())).min();
            let (pieces, stops): (Vec<&str>, Vec<&str>) =
                (pieces.iter().map(String::as_str).collect(), stops.iter().map(String::as_str).collect());
            let (out, stopped) = stream(&stops, &pieces);
            prop_assert_eq!(stopped, first.is_some());
            // With several stop strings a later, shorter one may end earlier and be seen first; it never shows more.
            match first {
                Some(at) if stops.len() == 1 => prop_assert_eq!(out, &whole[..at]),
                Some(_) => prop_assert!(whole.starts_with(&out)),
                None => prop_assert_eq!(out, whole),
            }
        }
    }
}
