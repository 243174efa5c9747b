//! The passes over a whole row: its maximum, exponentials and sums.
//!
//! A row has up to some 150,000 logits, so each pass is a loop without branches over fixed chunks, which the compiler
//! turns into vector code. Sums have a fixed number of lanes, each in `f64`: the same row gives the same bits on every
//! machine. `NaN` and -∞ have no probability; +∞ counts as `f32::MAX`.

/// Logits that share one entry of [`block_maxima`], and weights that are summed before they are compared.
pub(super) const BLOCK: usize = 64;
const LANES: usize = 8;

/// The largest value; -∞ if there is no number.
pub(super) fn max(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, tail) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, x);
        }
    }
    lanes.iter().chain(tail).fold(f32::NEG_INFINITY, |m, &x| larger(m, x))
}

/// `x` if it is larger; so never a `NaN`, if `m` is none. (`f32::max` orders its operands the other way, and is
/// slower.)
#[inline]
fn larger(m: f32, x: f32) -> f32 {
    if x > m { x } else { m }
}

/// The lowest index of the largest value; `None` if none is above -∞.
pub(super) fn argmax(values: &[f32]) -> Option<usize> {
    let (mut best, mut block) = (f32::NEG_INFINITY, None);
    for (i, values) in values.chunks(BLOCK).enumerate() {
        let m = max(values);
        if m > best {
            (best, block) = (m, Some(i));
        }
    }
    let first = block? * BLOCK;
    values[first..].iter().position(|&x| x == best).map(|i| first + i)
}

/// Sets `maxima[i]` to the maximum of the `i`-th [`BLOCK`] of `values`.
pub(super) fn block_maxima(values: &[f32], maxima: &mut Vec<f32>) {
    maxima.clear();
    maxima.extend(values.chunks(BLOCK).map(max));
}

/// A softmax without its division: the weight of a logit is `exp((logit - max) / temperature)`, in `0.0..=1.0`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Softmax {
    max: f32,
    inverse_temperature: f32,
}

impl Softmax {
    /// `max`: the largest logit of the row, above -∞.
    pub(super) fn new(max: f32, temperature: f32) -> Self {
        // The smallest temperatures have no finite inverse.
        Self { max: max.min(f32::MAX), inverse_temperature: temperature.recip().min(f32::MAX) }
    }

    /// `(logit - max) / temperature`.
    #[inline]
    fn exponent(self, logit: f32) -> f32 {
        let logit = if logit > f32::MAX { f32::MAX } else { logit };
        (logit - self.max) * self.inverse_temperature
    }

    /// The weight of a logit.
    #[inline]
    pub(super) fn weight(self, logit: f32) -> f32 {
        exp(self.exponent(logit))
    }

    /// The logarithm of the sum of the weights.
    pub(super) fn log_sum(self, logits: &[f32]) -> f64 {
        sum(logits, |x| self.weight(x)).ln()
    }

    /// The log-probability of a logit in a row whose [`log_sum`](Self::log_sum) is given; -∞ for a `NaN`.
    pub(super) fn logprob(self, logit: f32, log_sum: f64) -> f32 {
        let logprob = f64::from(self.exponent(logit)) - log_sum;
        if logprob.is_nan() { f32::NEG_INFINITY } else { logprob as f32 }
    }
}

/// The sum of `f(value)`, in [`LANES`] sums of `f64`.
#[inline]
pub(super) fn sum(values: &[f32], f: impl Fn(f32) -> f32) -> f64 {
    let mut lanes = [0.0f64; LANES];
    let (chunks, tail) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(f(x));
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(tail) {
        *lane += f64::from(f(x));
    }
    lanes.iter().sum()
}

/// `exp(x)` for `x <= 0`, with a relative error below 2e-7; 1 for 0, and 0 for what is below the smallest normal number
/// and for `NaN`.
///
/// `x = n·ln 2 + r` with `|r| <= ln 2 / 2`, a polynomial in `r` (the coefficients of Cephes' `expf`), and `n` put into
/// the exponent. It stands here because the standard library's is a call per value, and differs between platforms.
#[inline]
fn exp(x: f32) -> f32 {
    /// `ln(f32::MIN_POSITIVE)`, rounded up.
    const LOWEST: f32 = -87.336_54;
    /// 1.5·2²³: a sum with it has no bits for a fraction, so it rounds, and holds the integer in its lowest bits.
    const ROUND: f32 = 12_582_912.0;
    /// The upper bits of ln 2, few enough that `n` times it is exact, and the rest.
    const LN_2: [f32; 2] = [355.0 / 512.0, -2.121_944_4e-4];

    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = x - n * LN_2[0] - n * LN_2[1];
    let mut p = 1.987_569_1e-4;
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
        p = p * r + c;
    }
    let power = f32::from_bits((rounded.to_bits() << 23).wrapping_add(127 << 23));
    let y = (p * r * r + r + 1.0) * power;
    if x >= LOWEST { y } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_to_the_true_one() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        for x in [-87.34, -100.0, -1e30, f32::NEG_INFINITY, f32::NAN] {
            assert_eq!(exp(x), 0.0, "exp({x})");
        }
        for i in 0..873_000 {
            let x = -(i as f32) * 1e-4;
            let expected = f64::from(x).exp();
            assert!((f64::from(exp(x)) / expected - 1.0).abs() < 2e-7, "exp({x}) = {} not {expected}", exp(x));
        }
    }

    #[test]
    fn max_and_argmax_take_the_first_of_the_largest_and_no_nan() {
        for len in [1, 7, 8, 9, 63, 64, 65, 200] {
            let row: Vec<f32> = (0..len).map(|i| ((i * 37 + 11) % 29) as f32 - 40.0).collect();
            let expected = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(max(&row), expected);
            assert_eq!(argmax(&row), row.iter().position(|&x| x == expected));
            for at in 0..len {
                let mut row = row.clone();
                row[at] = f32::NAN;
                let expected = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                assert_eq!(max(&row), expected);
                assert_eq!(argmax(&row), row.iter().position(|&x| x == expected && x > f32::NEG_INFINITY));
            }
        }
        assert_eq!(argmax(&[]), None);
        assert_eq!(argmax(&[f32::NEG_INFINITY, f32::NAN]), None);
        assert_eq!(argmax(&[0.0, f32::INFINITY, f32::INFINITY]), Some(1));
    }

    #[test]
    fn weights_and_logprobs_of_odd_logits_are_defined() {
        let softmax = Softmax::new(f32::INFINITY, 1.0);
        assert_eq!(softmax.weight(f32::INFINITY), 1.0);
        assert_eq!(softmax.weight(f32::NAN), 0.0);
        assert_eq!(softmax.weight(-f32::MAX), 0.0);
        let row = [f32::INFINITY, 3.0, f32::INFINITY, f32::NAN];
        let log_sum = softmax.log_sum(&row);
        assert_eq!(softmax.logprob(row[0], log_sum), 0.5f32.ln());
        assert_eq!(softmax.logprob(row[1], log_sum), -f32::MAX);
        assert_eq!(softmax.logprob(row[3], log_sum), f32::NEG_INFINITY);
        // The coldest and the hottest temperature: the maximum alone; all numbers alike.
        assert_eq!(Softmax::new(5.0, f32::MIN_POSITIVE / 4.0).weight(5.0), 1.0);
        assert_eq!(Softmax::new(5.0, f32::MIN_POSITIVE / 4.0).weight(4.999), 0.0);
        assert_eq!(Softmax::new(5.0, f32::INFINITY).weight(-5.0), 1.0);
        assert_eq!(Softmax::new(5.0, f32::INFINITY).weight(f32::NEG_INFINITY), 0.0);
    }
}
