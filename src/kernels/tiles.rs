//! Disjoint rectangles of one row-major buffer, so that threads may write their own tiles of a shared matrix.

use std::marker::PhantomData;

/// A rectangle `[rows, cols]` of a row-major matrix, writable by its one owner.
pub struct TileMut<'a> {
    data: *mut f32,
    stride: usize,
    rows: usize,
    cols: usize,
    /// First row in the whole matrix.
    pub row0: usize,
    /// First column in the whole matrix.
    pub col0: usize,
    owner: PhantomData<&'a mut [f32]>,
}

// SAFETY: a tile is an exclusive borrow of plain floats; `split_grid` makes no two tiles overlap.
unsafe impl Send for TileMut<'_> {}

impl TileMut<'_> {
    /// Rows of the tile.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns of the tile.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Distance between rows in the whole matrix.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// Element `(i, j)`, from which every later element of the tile may be reached.
    pub(super) fn pointer(&mut self, i: usize, j: usize) -> *mut f32 {
        assert!(i < self.rows && j < self.cols, "tile element ({i}, {j}) of {} x {}", self.rows, self.cols);
        // SAFETY: the element lies within the tile.
        unsafe { self.data.add(i * self.stride + j) }
    }

    /// Rows `i .. i + n` as one slice, where nothing else lies between them.
    #[inline]
    pub(super) fn solid(&mut self, i: usize, n: usize) -> Option<&mut [f32]> {
        let all = i + n <= self.rows && self.cols == self.stride;
        // SAFETY: the rows lie within the tile, and without a gap.
        all.then(|| unsafe { std::slice::from_raw_parts_mut(self.data.add(i * self.stride), n * self.cols) })
    }

    /// All of a matrix with rows `stride` apart, as one tile of `cols` columns.
    ///
    /// # Panics
    /// If `rows` rows do not lie within the matrix.
    pub fn whole(matrix: &mut [f32], stride: usize, rows: usize, cols: usize) -> TileMut<'_> {
        assert!(
            cols <= stride && (rows == 0 || (rows - 1) * stride + cols <= matrix.len()),
            "a tile leaves the matrix"
        );
        TileMut { data: matrix.as_mut_ptr(), stride, rows, cols, row0: 0, col0: 0, owner: PhantomData }
    }

    /// Row `i` of the tile: `[cols]`.
    #[inline]
    pub fn row(&mut self, i: usize) -> &mut [f32] {
        assert!(i < self.rows, "tile row {i} of {}", self.rows);
        // SAFETY: row i lies within the matrix (checked in `split_grid`) and belongs to this tile alone.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(i * self.stride), self.cols) }
    }
}

/// Cuts `matrix: [_, stride]` at the given row and column bounds, row by row of the grid.
///
/// `rows` and `cols` are ascending bounds, first to last: `[0, 2, 5]` makes two bands of 2 and 3.
///
/// # Panics
/// If bounds are not ascending or leave the matrix.
pub fn split_grid<'a>(matrix: &'a mut [f32], stride: usize, rows: &[usize], cols: &[usize]) -> Vec<TileMut<'a>> {
    let ascending = |bounds: &[usize]| bounds.windows(2).all(|pair| pair[0] <= pair[1]);
    assert!(ascending(rows) && ascending(cols), "split_grid: bounds must ascend");
    let (last_row, last_col) = (rows.last().copied().unwrap_or(0), cols.last().copied().unwrap_or(0));
    assert!(last_col <= stride && last_row * stride <= matrix.len(), "split_grid: bounds leave the matrix");
    let data = matrix.as_mut_ptr();
    let mut tiles = Vec::with_capacity(rows.len().saturating_sub(1) * cols.len().saturating_sub(1));
    for row in rows.windows(2) {
        for col in cols.windows(2) {
            tiles.push(TileMut {
                // SAFETY: row[0] * stride + col[0] is at most one past the end, by the asserts above.
                data: unsafe { data.add((row[0] * stride + col[0]).min(last_row * stride)) },
                stride,
                rows: row[1] - row[0],
                cols: col[1] - col[0],
                row0: row[0],
                col0: col[0],
                owner: PhantomData,
            });
        }
    }
    tiles
}

/// Ascending bounds `0, step, 2 step, …, end`.
pub fn bounds(end: usize, step: usize) -> Vec<usize> {
    (0..end).step_by(step.max(1)).chain([end]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_the_matrix_once() {
        let (rows, cols, stride) = (7, 10, 11);
        let mut matrix = vec![0.0; rows * stride];
        for mut tile in split_grid(&mut matrix, stride, &bounds(rows, 3), &bounds(cols, 4)) {
            for i in 0..tile.rows() {
                tile.row(i).iter_mut().for_each(|v| *v += 1.0);
            }
        }
        for (i, v) in matrix.iter().enumerate() {
            assert_eq!(*v, f32::from(u8::from(i % stride < cols)), "element {i}");
        }
    }
}
