//! Pairs of rows and columns with the largest sum.

/// For each row of `score: [n, n]` a column of its own, so that the sum of the scores is largest.
///
/// Shortest augmenting paths with potentials, `O(n^3)`. Where several ways have the same sum up to rounding, the one is
/// taken that a search from the first row to the last finds, columns in order: of equal scores, the identity. Scores that
/// are not finite count as the worst.
///
/// # Panics
/// If `score` is not square of size `n`: callers make both.
///
/// # Source
/// Jonker and Volgenant 1987, A shortest augmenting path algorithm for dense and sparse linear assignment problems.
pub(crate) fn assign(score: &[f64], n: usize) -> Vec<usize> {
    assert_eq!(score.len(), n * n, "one score for each pair");
    let cost = costs(score);
    // Row and column 0 are not real: a path begins at column 0.
    let (mut row_potential, mut column_potential) = (vec![0.0; n + 1], vec![0.0; n + 1]);
    let mut row_of = vec![0; n + 1];
    for row in 1..=n {
        row_of[0] = row;
        let (mut least, mut before) = (vec![f64::INFINITY; n + 1], vec![0; n + 1]);
        let mut visited = vec![false; n + 1];
        let mut column = 0;
        while row_of[column] != 0 {
            visited[column] = true;
            let here = row_of[column];
            let (mut step, mut next) = (f64::INFINITY, 0);
            for j in (1..=n).filter(|j| !visited[*j]) {
                let reduced =
                    cost[(here - 1) * n + j - 1] - row_potential[here] - column_potential[j];
                if reduced < least[j] {
                    (least[j], before[j]) = (reduced, column);
                }
                if least[j] < step {
                    (step, next) = (least[j], j);
                }
            }
            for j in 0..=n {
                if visited[j] {
                    row_potential[row_of[j]] += step;
                    column_potential[j] -= step;
                } else {
                    least[j] -= step;
                }
            }
            column = next;
        }
        while column != 0 {
            row_of[column] = row_of[before[column]];
            column = before[column];
        }
    }
    let mut column_of = vec![0; n];
    (1..=n).for_each(|j| column_of[row_of[j] - 1] = j - 1);
    column_of
}

/// Scores as costs from 0 to 1, on a grid coarse enough that rounding makes no difference between equal ones.
fn costs(score: &[f64]) -> Vec<f64> {
    const GRID: f64 = (1u64 << 40) as f64;
    let finite = || score.iter().copied().filter(|s| s.is_finite());
    let (least, most) =
        (finite().fold(f64::INFINITY, f64::min), finite().fold(f64::NEG_INFINITY, f64::max));
    let width = if most > least { most - least } else { 1.0 };
    let cost = |s: &f64| match s.is_finite() {
        true => ((most - s) / width * GRID).round() / GRID,
        false => 1.0,
    };
    score.iter().map(cost).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn by_hand() {
        // Greed takes 9 and is left with 1; 8 + 7 is more.
        assert_eq!(assign(&[9.0, 8.0, 7.0, 1.0], 2), [1, 0]);
        assert_eq!(assign(&[0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0], 3), [1, 2, 0]);
        assert_eq!(assign(&[], 0), [0usize; 0]);
        assert_eq!(assign(&[-3.0], 1), [0]);
    }

    #[test]
    fn equal_scores_leave_everything_in_place() {
        for n in 1..9 {
            let identity: Vec<usize> = (0..n).collect();
            assert_eq!(assign(&vec![0.25; n * n], n), identity);
            assert_eq!(assign(&vec![f64::NAN; n * n], n), identity);
        }
    }

    fn best(score: &[f64], n: usize, row: usize, free: &mut Vec<usize>) -> f64 {
        if row == n {
            return 0.0;
        }
        let mut most = f64::NEG_INFINITY;
        for at in 0..free.len() {
            let column = free.remove(at);
            most = most.max(score[row * n + column] + best(score, n, row + 1, free));
            free.insert(at, column);
        }
        most
    }

    proptest! {
        #[test]
        fn no_other_pairs_have_a_larger_sum(
            (n, score) in (1usize..7).prop_flat_map(|n| {
                // Few distinct values: many ties.
                let number = prop_oneof![-1.0..1.0f64, (0..3i32).prop_map(f64::from)];
                (Just(n), prop::collection::vec(number, n * n))
            })
        ) {
            let found = assign(&score, n);
            let mut columns = found.clone();
            columns.sort_unstable();
            prop_assert_eq!(columns, (0..n).collect::<Vec<_>>());
            let sum: f64 = found.iter().enumerate().map(|(i, j)| score[i * n + j]).sum();
            let most = best(&score, n, 0, &mut (0..n).collect());
            prop_assert!((sum - most).abs() < 1e-9, "{} of {}", sum, most);
        }

        #[test]
        fn a_permutation_is_found_again(order in Just((0..40usize).collect::<Vec<_>>()).prop_shuffle()) {
            let n = order.len();
            let mut score = vec![0.0; n * n];
            for (i, &j) in order.iter().enumerate() {
                (0..n).for_each(|k| score[i * n + k] = ((i * k) % 7) as f64 / 100.0);
                score[i * n + j] = 1.0;
            }
            prop_assert_eq!(assign(&score, n), order);
        }
    }
}
