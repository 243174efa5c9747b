//! The changes to a row of logits that come before the choice: bias, penalties, bans, the tokens allowed.

use super::SampleRow;

/// Applies, in this order: logit bias, repetition penalty, frequency penalty, presence penalty, bans and what is not
/// allowed. Only the logits of tokens that these name are touched.
///
/// `seen`: one entry per logit, all 0, and 0 again afterwards. The cost is that of the lists, not of the vocabulary
/// (but for `allowed`, which speaks of all of it). Ids beyond the row are ignored.
pub(super) fn edit(logits: &mut [f32], row: &SampleRow<'_>, seen: &mut Vec<u32>) {
    let params = row.params;
    for &(id, bias) in &params.logit_bias {
        if let Some(logit) = logits.get_mut(id as usize) {
            *logit += bias;
        }
    }
    let repetition = params.repetition_penalty != 1.0;
    let (frequency, presence) = (params.frequency_penalty, params.presence_penalty);
    if repetition || frequency != 0.0 || presence != 0.0 {
        seen.resize(logits.len(), 0);
    }
    if repetition {
        repeat(logits, row, seen);
    }
    if frequency != 0.0 || presence != 0.0 {
        for &id in row.generated {
            if let Some(count) = seen.get_mut(id as usize) {
                *count += 1;
            }
        }
        for &id in row.generated {
            let Some(count) = seen.get_mut(id as usize) else { continue };
            if *count > 0 {
                logits[id as usize] -= frequency * *count as f32;
                logits[id as usize] -= presence;
                *count = 0;
            }
        }
    }
    for &id in row.banned {
        if let Some(logit) = logits.get_mut(id as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
    if let Some(mask) = row.allowed {
        allow(logits, mask);
    }
}

/// Bans all tokens but those whose bits are set.
fn allow(logits: &mut [f32], mask: &[u32]) {
    for (logits, &word) in logits.chunks_mut(32).zip(mask.iter().chain(std::iter::repeat(&0))) {
        if word != u32::MAX {
            for (bit, logit) in logits.iter_mut().enumerate() {
                *logit = if word >> bit & 1 == 1 { *logit } else { f32::NEG_INFINITY };
            }
        }
    }
}

/// The repetition penalty, once for each token of the prompt or the output.
fn repeat(logits: &mut [f32], row: &SampleRow<'_>, seen: &mut [u32]) {
    let penalty = row.params.repetition_penalty;
    for &id in row.prompt.iter().chain(row.generated) {
        let Some(seen) = seen.get_mut(id as usize) else { continue };
        if *seen == 0 {
            *seen = 1;
            let logit = &mut logits[id as usize];
            *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
        }
    }
    for &id in row.prompt.iter().chain(row.generated) {
        if let Some(seen) = seen.get_mut(id as usize) {
            *seen = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SampleParams;

    fn check(params: SampleParams, prompt: &[u32], generated: &[u32], banned: &[u32], expected: [f32; 4]) {
        let row = SampleRow { prompt, generated, banned, ..SampleRow::new(0, &params, 9) };
        let (mut logits, mut seen) = ([4.0, -4.0, 2.0, 0.0], Vec::new());
        edit(&mut logits, &row, &mut seen);
        assert_eq!(logits, expected, "{params:?}");
        assert!(seen.iter().all(|&n| n == 0), "the counts were left behind");
    }

    #[test]
    fn defaults_change_nothing() {
        check(SampleParams::default(), &[0, 1], &[2, 2], &[], [4.0, -4.0, 2.0, 0.0]);
    }

    #[test]
    fn bias_is_added() {
        let params = SampleParams { logit_bias: vec![(1, 5.0), (3, -1.0), (3, -1.0)], ..Default::default() };
        check(params, &[], &[], &[], [4.0, 1.0, 2.0, -2.0]);
    }

    #[test]
    fn repetition_divides_positive_and_multiplies_negative_logits_once() {
        let params = SampleParams { repetition_penalty: 2.0, ..Default::default() };
        check(params, &[0, 0, 3], &[0, 1, 1], &[], [2.0, -8.0, 2.0, 0.0]);
    }

    #[test]
    fn presence_and_frequency_look_at_the_output_alone() {
        let params = SampleParams { presence_penalty: 0.5, ..Default::default() };
        check(params, &[0], &[1, 2, 1], &[], [4.0, -4.5, 1.5, 0.0]);
        let params = SampleParams { frequency_penalty: 0.5, ..Default::default() };
        check(params, &[0], &[1, 2, 1], &[], [4.0, -5.0, 1.5, 0.0]);
        let params = SampleParams { presence_penalty: -1.0, frequency_penalty: 0.25, ..Default::default() };
        check(params, &[0], &[1, 2, 1, 1, 1], &[], [4.0, -4.0, 2.75, 0.0]);
    }

    #[test]
    fn bias_comes_before_penalties_and_bans_come_last() {
        let params = SampleParams {
            logit_bias: vec![(0, -6.0), (2, f32::INFINITY)],
            repetition_penalty: 2.0,
            presence_penalty: 1.0,
            frequency_penalty: 0.5,
            ..Default::default()
        };
        // (4 - 6)·2 - 2·0.5 - 1; -4·2
        check(params, &[1], &[0, 0], &[2], [-6.0, -8.0, f32::NEG_INFINITY, 0.0]);
    }

    #[test]
    fn the_mask_comes_after_the_penalties() {
        // A negative penalty turns -∞ around: the token must stay out of reach.
        let params =
            SampleParams { repetition_penalty: -1.0, logit_bias: vec![(1, f32::INFINITY)], ..Default::default() };
        let row = SampleRow { prompt: &[0, 2], allowed: Some(&[0b0100]), ..SampleRow::new(0, &params, 0) };
        let mut logits = [-4.0, 1.0, 2.0, 0.0];
        edit(&mut logits, &row, &mut Vec::new());
        let none = f32::NEG_INFINITY;
        assert_eq!(logits, [none, none, -2.0, none]);
    }

    #[test]
    fn ids_beyond_the_row_are_ignored() {
        let params = SampleParams {
            logit_bias: vec![(4, 1.0), (u32::MAX, 1.0)],
            repetition_penalty: 2.0,
            frequency_penalty: 1.0,
            ..Default::default()
        };
        check(params, &[4], &[u32::MAX, 4], &[4, u32::MAX], [4.0, -4.0, 2.0, 0.0]);
    }

    #[test]
    fn rows_of_different_lengths_share_a_scratch() {
        let params = SampleParams { frequency_penalty: 1.0, ..Default::default() };
        let mut seen = Vec::new();
        for len in [3, 8, 2] {
            let generated = [1, 7];
            let row = SampleRow { generated: &generated, ..SampleRow::new(0, &params, 0) };
            let mut logits = vec![0.0; len];
            edit(&mut logits, &row, &mut seen);
            let expected: Vec<f32> = (0..len).map(|i| if i == 1 || i == 7 { -1.0 } else { 0.0 }).collect();
            assert_eq!(logits, expected);
        }
    }
}
