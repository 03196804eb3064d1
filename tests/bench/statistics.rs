//! Medians, spreads and percentiles.

/// The median; zero of nothing.
pub fn median(values: &[f64]) -> f64 {
    percentile(values, 0.5)
}

/// The difference between the largest and the smallest value, as a share of the median.
pub fn spread(values: &[f64]) -> f64 {
    let sorted = sorted(values);
    match (sorted.first(), sorted.last()) {
        (Some(smallest), Some(largest)) => (largest - smallest) / median(values),
        _ => 0.0,
    }
}

/// The value that `share` of the values do not exceed; zero of nothing.
pub fn percentile(values: &[f64], share: f64) -> f64 {
    let sorted = sorted(values);
    let last = sorted.len().saturating_sub(1);
    let at = ((sorted.len() as f64 * share) as usize).min(last);
    sorted.get(at).copied().unwrap_or_default()
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}
