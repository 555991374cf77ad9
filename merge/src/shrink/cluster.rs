//! Which experts become one: those whose mean is nearest to them, seldom used ones first.

/// Groups of experts, each sorted, in the order of their first.
pub(super) type Groups = Vec<Vec<usize>>;

/// What grouping costs.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Grouping {
    pub groups: Groups,
    /// `sum_e use_e |W_e - mean of its group|^2`
    pub cost: f64,
}

/// Joins experts until `wanted` groups are left, each time those two whose joining adds least to
/// `sum_e use_e |W_e - mean of its group|^2`, the mean weighted by use. Of equal costs, the first pair.
///
/// * `squared: [n, n]`: squared distances; `used: [n]`: positive
///
/// # Source
/// Ward 1963, Hierarchical grouping to optimize an objective function; distances of means by Lance and Williams 1967.
pub(super) fn group(squared: &[f64], used: &[f64], wanted: usize) -> Grouping {
    let n = used.len();
    let mut squared = squared.to_vec();
    let mut used = used.to_vec();
    let mut members: Vec<Vec<usize>> = (0..n).map(|e| vec![e]).collect();
    let mut left: Vec<usize> = (0..n).collect();
    let mut cost = 0.0;
    while left.len() > wanted.max(1) {
        let joined =
            |a: usize, b: usize| used[a] * used[b] / (used[a] + used[b]) * squared[a * n + b];
        let pairs =
            left.iter().enumerate().flat_map(|(i, &a)| left[i + 1..].iter().map(move |&b| (a, b)));
        let Some((a, b)) = pairs.min_by(|x, y| joined(x.0, x.1).total_cmp(&joined(y.0, y.1)))
        else {
            break;
        };
        cost += joined(a, b);
        let (share_a, share_b) = (used[a] / (used[a] + used[b]), used[b] / (used[a] + used[b]));
        let between = squared[a * n + b];
        for &c in left.iter().filter(|c| **c != a && **c != b) {
            let to_mean = share_a * squared[a * n + c] + share_b * squared[b * n + c]
                - share_a * share_b * between;
            (squared[a * n + c], squared[c * n + a]) = (to_mean.max(0.0), to_mean.max(0.0));
        }
        used[a] += used[b];
        let others = std::mem::take(&mut members[b]);
        members[a].extend(others);
        left.retain(|c| *c != b);
    }
    let mut groups: Groups = left.iter().map(|&a| std::mem::take(&mut members[a])).collect();
    groups.iter_mut().for_each(|g| g.sort_unstable());
    groups.sort_by_key(|g| g.first().copied());
    Grouping { groups, cost }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Points on a line.
    fn squared(points: &[f64]) -> Vec<f64> {
        points.iter().flat_map(|a| points.iter().map(move |b| (a - b).powi(2))).collect()
    }

    #[test]
    fn by_hand() {
        let points = [0.0, 1.0, 10.0, 10.5];
        let found = group(&squared(&points), &[1.0; 4], 2);
        assert_eq!(found.groups, [vec![0, 1], vec![2, 3]]);
        assert!((found.cost - (0.5 + 0.125)).abs() < 1e-12);
        // The nearest two are much used: joining the seldom used ones costs less.
        let found = group(&squared(&points), &[0.01, 0.01, 1.0, 1.0], 3);
        assert_eq!(found.groups, [vec![0, 1], vec![2], vec![3]]);
        let all = group(&squared(&points), &[1.0; 4], 1);
        assert_eq!(all.groups, [vec![0, 1, 2, 3]]);
        assert_eq!(group(&squared(&points), &[1.0; 4], 4).cost, 0.0);
    }

    #[test]
    fn copies_are_joined_first() {
        let points = [3.0, 1.0, 2.0, 3.0, 1.0, 2.0];
        let found = group(&squared(&points), &[0.3, 0.1, 0.1, 0.2, 0.2, 0.1], 3);
        assert_eq!(found.groups, [vec![0, 3], vec![1, 4], vec![2, 5]]);
        assert_eq!(found.cost, 0.0);
    }

    proptest! {
        #[test]
        fn the_cost_is_the_sum_of_squares_around_the_means(
            points in prop::collection::vec((-5.0..5.0f64, 0.01..1.0f64), 2..12),
            wanted in 1usize..12,
        ) {
            let (at, used): (Vec<f64>, Vec<f64>) = points.into_iter().unzip();
            let found = group(&squared(&at), &used, wanted);
            prop_assert_eq!(found.groups.len(), wanted.min(at.len()));
            let mut members: Vec<usize> = found.groups.concat();
            members.sort_unstable();
            prop_assert_eq!(members, (0..at.len()).collect::<Vec<_>>());
            let cost: f64 = found.groups.iter().map(|g| {
                let all: f64 = g.iter().map(|e| used[*e]).sum();
                let mean = g.iter().map(|e| used[*e] * at[*e]).sum::<f64>() / all;
                g.iter().map(|e| used[*e] * (at[*e] - mean).powi(2)).sum::<f64>()
            }).sum();
            prop_assert!((cost - found.cost).abs() < 1e-9, "{} {}", cost, found.cost);
        }
    }
}
