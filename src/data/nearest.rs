//! The nearest known thing to what was written, for error messages that help.

/// The candidate with the smallest edit distance to `name`, if it is near enough to be a slip.
pub fn closest_name<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let lower = name.to_lowercase();
    candidates
        .into_iter()
        .map(|candidate| (edit_distance(&lower, &candidate.to_lowercase()), candidate))
        .filter(|&(distance, candidate)| distance <= name.len().max(candidate.len()) / 2)
        .min_by_key(|&(distance, _)| distance)
        .map(|(_, candidate)| candidate)
}

/// Levenshtein's distance between two words, in characters.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &cb) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(ca != cb);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

/// The part of `text` nearest to `pattern` by edit distance (Sellers 1980).
///
/// Empty only if one of the two is.
pub fn closest_part<'a>(pattern: &str, text: &'a str) -> &'a str {
    let pattern: Vec<char> = pattern.chars().collect();
    let mut ends: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
    ends.push(text.len());
    // column[i] = (distance of pattern[..i] to the best part ending here, where that part starts).
    let mut column: Vec<(usize, usize)> = (0..=pattern.len()).map(|i| (i, 0)).collect();
    let mut best = (usize::MAX, 0, 0);
    for (at, c) in text.chars().enumerate() {
        let mut diagonal = column[0];
        column[0] = (0, at + 1);
        for (i, &p) in pattern.iter().enumerate() {
            let substituted = (diagonal.0 + usize::from(p != c), diagonal.1);
            diagonal = column[i + 1];
            let inserted = (diagonal.0 + 1, diagonal.1);
            let deleted = (column[i].0 + 1, column[i].1);
            column[i + 1] = substituted.min(inserted).min(deleted);
        }
        let (distance, start) = column[pattern.len()];
        if distance < best.0 {
            best = (distance, start, at + 1);
        }
    }
    if best.0 == usize::MAX || best.1 >= best.2 {
        return text;
    }
    &text[ends[best.1]..ends[best.2]]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_a_slip_and_no_more() {
        assert_eq!(closest_name("text", ["label", "Texts", "id"]), Some("Texts"));
        assert_eq!(closest_name("messages", ["id", "label"]), None);
    }

    #[test]
    fn finds_the_nearest_part() {
        let text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes";
        assert_eq!(closest_part("<|im_start|>asistant\n", text), "<|im_start|>assistant\n");
        assert_eq!(closest_part("<|im_start|> user\n", text), "<|im_start|>user\n");
        assert_eq!(closest_part("abc", ""), "");
    }
}
