//! Several short rows in one packed row: best-fit decreasing, so that packed rows have nearly the same length.
//!
//! Johnson 1973, "Near-optimal bin packing algorithms". Rows are never cut, and stay sequences of their own: positions,
//! attention, targets and dropout masks are those of the row alone.

use std::cmp::Reverse;
use std::collections::BTreeSet;

/// Which rows stand together so that no packed row holds more than `max_length` tokens; a longer row stands alone.
///
/// Rows go from the longest to the shortest (the earlier first among equals), each into the fullest packed row that has
/// room for it (the earlier first among equals).
pub fn pack(lengths: &[usize], max_length: usize) -> Vec<Vec<u32>> {
    let mut order: Vec<u32> = (0..lengths.len() as u32).collect();
    order.sort_by_key(|&row| Reverse(lengths[row as usize]));
    let mut packs: Vec<Vec<u32>> = Vec::new();
    let mut open: BTreeSet<(usize, usize)> = BTreeSet::new(); // (room, pack)
    for row in order {
        let len = lengths[row as usize];
        let fullest = open.range((len, 0)..).next().copied();
        let (room, pack) = fullest.unwrap_or_else(|| {
            packs.push(Vec::new());
            (max_length.max(len), packs.len() - 1)
        });
        open.remove(&(room, pack));
        packs[pack].push(row);
        open.insert((room - len, pack));
    }
    packs
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn rows_go_where_they_fit_best() {
        // 7 | 6 | 5 + 2 would leave no room for 3 + 4; best fit: 7 + 3, 6 + 4, 5 + 2 + 2.
        assert_eq!(pack(&[2, 5, 3, 7, 6, 2, 4], 10), [vec![3, 2], vec![4, 6], vec![1, 0, 5]]);
        assert_eq!(pack(&[12, 1], 10), [vec![0], vec![1]], "a row that is too long stands alone");
        assert_eq!(pack(&[], 10), Vec::<Vec<u32>>::new());
    }

    proptest! {
        #[test]
        fn every_row_once_and_no_pack_too_long(lengths in prop::collection::vec(1usize..40, 0..200)) {
            let packs = pack(&lengths, 40);
            let mut rows: Vec<u32> = packs.concat();
            rows.sort_unstable();
            prop_assert!(rows.into_iter().eq(0..lengths.len() as u32));
            let tokens = |pack: &Vec<u32>| pack.iter().map(|&row| lengths[row as usize]).sum::<usize>();
            prop_assert!(packs.iter().all(|pack| tokens(pack) <= 40));
            // At most one pack is half empty or more: two of them would have been one.
            prop_assert!(packs.iter().filter(|pack| tokens(pack) <= 20).count() <= 1);
        }
    }
}
