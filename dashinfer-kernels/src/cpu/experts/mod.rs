//! Mixtures of experts: only what some row chose is read, by all threads, in one pass over the matrices of a batch of experts.
//!
//! ```text
//!   route ─ sort by expert ─┬─ gather rows ─ gate, up of all experts ─ f(gate) · up ─ down of all experts ─ add to rows ─┐
//!                           └─────────────────────────── for each batch of experts ──────────────────────────────────────┘
//! ```
//!
//! A step of few rows is one batch: two parallel loops over matrices, however many experts there are. More rows are cut into
//! batches of whole experts, so that what they work in stays small. Each place (a row of `x` and one of its experts) has a row of its
//! own in all of it, and a row's places are added in ascending order of experts: so its result does not depend on other rows.

mod plan;
#[cfg(test)]
mod tests;

use std::ops::Range;

use plan::Plan;
pub(crate) use plan::{Group, side_by_side};

use super::CpuLinear;
use super::aligned::AlignedBuf;
use super::backend::{CpuBackend, CpuTensor};
use super::gate::Gate;
use super::linear::{self, PackedMatrix, SendPtr};
use super::linear_bf16::{self, Rounded};
use super::pool::ThreadPool;
use super::quantized::{self, Activations, QuantizedMatrix};
use crate::error::check;
use crate::moe::choose;
use crate::quant::PANEL;
use crate::{Chosen, DType, KernelError, Routing, Scheme};

/// Places of a batch, if no expert has more: some for each of many experts, so that threads share them well, and few enough for
/// caches to hold what goes from one loop to the next.
const BATCH: usize = 1024;

/// The experts of a layer.
#[derive(Debug)]
pub struct CpuExperts {
    /// `[2 F, E]` each
    gate_up: Vec<CpuLinear>,
    /// `[E, F]` each
    down: Vec<CpuLinear>,
}

/// What experts work in; see [`crate::Backend::expert_scratch`].
#[derive(Debug)]
pub struct CpuExpertScratch {
    max_rows: usize,
    /// Most places of a batch.
    most: usize,
    hidden: usize,
    inner: usize,
    num_experts: usize,
    top_k: usize,
    /// `[T, scores of a row]`
    scores: Vec<f32>,
    /// `[T, top_k]`
    chosen: Vec<Chosen>,
    /// `[N]`: which were chosen.
    seen: Vec<bool>,
    plan: Plan,
    /// The groups of a batch, from row 0 on.
    groups: Vec<Group>,
    /// `[places, E]`: rows of `x`, then what experts make of them.
    wide: AlignedBuf<f32>,
    /// `[places, 2 F]`
    gate_up: AlignedBuf<f32>,
    /// `[places, F]`
    acts: AlignedBuf<f32>,
    /// Of the rows of `x`, each rounded once for all its experts.
    of_x: Operand,
    /// Of the places.
    operand: Operand,
}

/// Rows as products of other types than f32 read them.
#[derive(Debug, Default)]
pub(super) struct Operand {
    pub(super) bf16: Rounded,
    pub(super) quantized: Activations,
}

/// What the operator has of its backend.
pub(super) struct Machine<'a> {
    pub(super) pool: &'a ThreadPool,
    pub(super) product: linear::Product,
    pub(super) bf16_product: Option<linear_bf16::Product>,
    pub(super) quantized_product: quantized::Product,
    pub(super) gate: Gate,
}

/// The operands; see [`crate::Backend::experts`].
pub(super) struct Layer<'a> {
    pub(super) x: &'a CpuTensor,
    pub(super) logits: &'a CpuTensor,
    pub(super) correction: Option<&'a [f32]>,
    pub(super) experts: &'a CpuExperts,
    pub(super) routing: &'a Routing,
}

/// Most places of a batch.
fn batch_places(max_rows: usize, top_k: usize) -> usize {
    max_rows.saturating_mul(top_k).min(max_rows.max(BATCH))
}

/// Bytes that [`Backend::expert_scratch`](crate::Backend::expert_scratch) takes at most on the CPU, for experts of `inner` between
/// `hidden` features; saturating.
#[must_use]
pub fn expert_bytes(max_rows: usize, hidden: usize, inner: usize, routing: &Routing) -> usize {
    let most = batch_places(max_rows, routing.top_k);
    let cols = inner.saturating_mul(3).saturating_add(hidden);
    let places = most.saturating_mul(cols).saturating_mul(size_of::<f32>());
    let rounded = [(most, hidden.max(inner)), (max_rows, hidden)]
        .map(|(rows, cols)| Activations::max_bytes(rows, cols).max(Rounded::max_bytes(rows, cols)));
    let rounded = rounded[0].saturating_add(rounded[1]);
    let choice = size_of::<Chosen>() + 2 * size_of::<u32>();
    let row =
        routing.scratch_len().saturating_mul(size_of::<f32>()).saturating_add(routing.top_k.saturating_mul(choice));
    places.saturating_add(rounded).saturating_add(max_rows.saturating_mul(row))
}

impl CpuExperts {
    pub(super) fn new(gate_up: Vec<CpuLinear>, down: Vec<CpuLinear>) -> Result<Self, KernelError> {
        const OP: &str = "pack_experts";
        check(OP, "number of down matrices", gate_up.len(), down.len())?;
        let (Some(first_up), Some(first_down)) = (gate_up.first(), down.first()) else {
            return Err(KernelError::Shape { op: OP, what: "experts", wanted: 1, found: 0 });
        };
        let (hidden, inner) = (first_up.cols(), first_down.cols());
        check(OP, "rows of down", hidden, first_down.rows())?;
        check(OP, "rows of gate and up", 2 * inner, first_up.rows())?;
        for (matrices, first) in [(&gate_up, first_up), (&down, first_down)] {
            for matrix in matrices {
                check(OP, "rows of an expert", first.rows(), matrix.rows())?;
                check(OP, "columns of an expert", first.cols(), matrix.cols())?;
                if kind(matrix) != kind(first) {
                    let what = "experts of different types in one layer".to_owned();
                    return Err(KernelError::Unsupported { op: OP, what, backend: "cpu" });
                }
                // Rows are rounded once for all experts.
                if order(matrix) != order(first) {
                    let what = "experts of one layer whose input features stand in different orders".to_owned();
                    return Err(KernelError::Unsupported { op: OP, what, backend: "cpu" });
                }
            }
        }
        Ok(Self { gate_up, down })
    }

    fn hidden(&self) -> usize {
        self.gate_up[0].cols()
    }

    fn inner(&self) -> usize {
        self.down[0].cols()
    }

    /// Experts.
    #[must_use]
    pub fn len(&self) -> usize {
        self.gate_up.len()
    }

    /// Whether there are none: never so.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.gate_up.is_empty()
    }
}

fn kind(matrix: &CpuLinear) -> (Option<DType>, Option<Scheme>) {
    match matrix {
        CpuLinear::Dense(matrix) => (Some(matrix.dtype()), None),
        CpuLinear::Quantized(matrix) => (None, Some(matrix.scheme())),
    }
}

fn order(matrix: &CpuLinear) -> Option<&[u32]> {
    match matrix {
        CpuLinear::Dense(_) => None,
        CpuLinear::Quantized(matrix) => matrix.order(),
    }
}

impl CpuExpertScratch {
    pub(super) fn new(max_rows: usize, hidden: usize, inner: usize, routing: &Routing) -> Result<Self, KernelError> {
        const OP: &str = "expert_scratch";
        routing.check(OP)?;
        let most = batch_places(max_rows, routing.top_k);
        let choices = max_rows.saturating_mul(routing.top_k);
        if u32::try_from(choices).is_err() {
            let wanted = u32::MAX as usize;
            return Err(KernelError::Shape {
                op: OP,
                what: "rows by experts of each, at most",
                wanted,
                found: choices,
            });
        }
        let buffer = |cols: usize| AlignedBuf::zeroed("what experts work in", most.saturating_mul(cols));
        Ok(Self {
            max_rows,
            most,
            hidden,
            inner,
            num_experts: routing.num_experts,
            top_k: routing.top_k,
            scores: Vec::with_capacity(max_rows.saturating_mul(routing.scratch_len())),
            chosen: Vec::with_capacity(choices),
            seen: Vec::with_capacity(routing.num_experts),
            plan: Plan::with_capacity(choices, routing.num_experts),
            groups: Vec::with_capacity(routing.num_experts),
            wide: buffer(hidden)?,
            gate_up: buffer(inner.saturating_mul(2))?,
            acts: buffer(inner)?,
            of_x: Operand::default(),
            operand: Operand::default(),
        })
    }

    /// The bytes of the experts that were chosen, each once.
    fn bytes_chosen(&mut self, experts: &CpuExperts) -> u64 {
        self.seen.clear();
        self.seen.resize(self.num_experts, false);
        let mut bytes = 0;
        for choice in &self.chosen {
            let expert = choice.expert as usize;
            if !std::mem::replace(&mut self.seen[expert], true) {
                bytes += experts.gate_up[expert].bytes() + experts.down[expert].bytes();
            }
        }
        bytes as u64
    }

    fn route(&mut self, layer: &Layer<'_>, pool: &ThreadPool) {
        let (rows, routing) = (layer.x.rows(), layer.routing);
        let (top_k, per_row) = (routing.top_k, routing.scratch_len());
        self.chosen.resize(rows * top_k, Chosen::default());
        self.scores.resize(rows * per_row, 0.0);
        let (chosen, scores) = (SendPtr(self.chosen.as_mut_ptr()), SendPtr(self.scores.as_mut_ptr()));
        let logits = layer.logits.values();
        // A score costs as much as some tens of copied values.
        CpuBackend::for_rows(pool, rows, 32 * routing.num_experts, &|row| {
            // SAFETY: both have a part for each row, and each row is one task's.
            let (chosen, scores) = unsafe {
                (
                    std::slice::from_raw_parts_mut(chosen.get().add(row * top_k), top_k),
                    std::slice::from_raw_parts_mut(scores.get().add(row * per_row), per_row),
                )
            };
            let logits = &logits[row * routing.num_experts..][..routing.num_experts];
            choose(chosen, logits, layer.correction, routing, scores);
        });
        self.plan.make(&self.chosen, top_k, routing.num_experts);
    }
}

/// Bytes of experts' matrices.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Reads {
    /// Those that the tasks have gone through.
    pub(super) visited: u64,
    /// Those of the experts that some row chose.
    pub(super) chosen: u64,
}

/// See [`crate::Backend::experts`]. Returns what was read of the experts.
pub(super) fn run(
    out: &mut CpuTensor,
    layer: &Layer<'_>,
    scratch: &mut CpuExpertScratch,
    machine: &Machine<'_>,
) -> Result<Reads, KernelError> {
    const OP: &str = "experts";
    let (x, experts, routing) = (layer.x, layer.experts, layer.routing);
    let (rows, hidden, inner) = (x.rows(), experts.hidden(), experts.inner());
    routing.check(OP)?;
    check(OP, "experts", routing.num_experts, experts.len())?;
    check(OP, "columns of x", hidden, x.cols())?;
    check(OP, "rows of logits", rows, layer.logits.rows())?;
    check(OP, "columns of logits", routing.num_experts, layer.logits.cols())?;
    check(OP, "length of the correction", routing.num_experts, layer.correction.map_or(experts.len(), <[f32]>::len))?;
    check(OP, "features of the scratch", hidden, scratch.hidden)?;
    check(OP, "inner features of the scratch", inner, scratch.inner)?;
    check(OP, "experts of the scratch", routing.num_experts, scratch.num_experts)?;
    check(OP, "experts of each row in the scratch", routing.top_k, scratch.top_k)?;
    if rows > scratch.max_rows {
        let found = scratch.max_rows;
        return Err(KernelError::Shape { op: OP, what: "room for rows in the scratch", wanted: rows, found });
    }
    out.resize(OP, rows, hidden)?;
    let mut reads = Reads::default();
    if rows == 0 {
        return Ok(reads);
    }
    scratch.route(layer, machine.pool);
    reads.chosen = scratch.bytes_chosen(experts);
    let (pool, gate) = (machine.pool, machine.gate);
    let CpuExpertScratch { most, chosen, plan, groups, wide, gate_up, acts, of_x, operand, .. } = scratch;
    of_x.round(x.values(), rows, &experts.gate_up[0], machine)?;
    let mut next = 0;
    while next < plan.groups.len() {
        let batch = plan.batch(next, *most);
        let places = plan.groups[batch.start].rows.start..plan.groups[batch.end - 1].rows.end;
        let of_batch = |group: &Group| Group {
            expert: group.expert,
            rows: group.rows.start - places.start..group.rows.end - places.start,
        };
        groups.clear();
        groups.extend(plan.groups[batch.clone()].iter().map(of_batch));
        let count = places.len();
        let rows = &plan.rows[places.clone()];
        match machine.kind(&experts.gate_up[0]) {
            Kind::F32 => gather(wide, x.values(), rows, hidden, pool),
            Kind::Bf16(..) => operand.bf16.gather(&of_x.bf16, rows, pool)?,
            Kind::Quantized(_) => operand.quantized.gather(&of_x.quantized, rows, pool)?,
        }
        let (up, rows) = (&mut gate_up[..2 * inner * count], &wide[..hidden * count]);
        reads.visited += machine.multiply(up, rows, operand, &experts.gate_up, groups);
        apply_gate(gate, acts, gate_up, count, inner, pool);
        operand.round(&acts[..inner * count], count, &experts.down[0], machine)?;
        let (back, rows) = (&mut wide[..hidden * count], &acts[..inner * count]);
        reads.visited += machine.multiply(back, rows, operand, &experts.down, groups);
        add_places(out, wide, &plan.places, chosen, places, pool);
        next = batch.end;
    }
    Ok(reads)
}

/// What products read of the rows.
enum Kind<'a> {
    F32,
    Bf16(linear_bf16::Product, &'a PackedMatrix),
    Quantized(&'a QuantizedMatrix),
}

impl Machine<'_> {
    fn kind<'a>(&self, matrix: &'a CpuLinear) -> Kind<'a> {
        match (matrix, self.bf16_product) {
            (CpuLinear::Dense(matrix), Some(product)) if matrix.dtype() == DType::BF16 => Kind::Bf16(product, matrix),
            (CpuLinear::Dense(_), _) => Kind::F32,
            (CpuLinear::Quantized(matrix), _) => Kind::Quantized(matrix),
        }
    }

    /// The products of all `groups`, side by side. `x` is what `operand` was made of. Returns the bytes of the panels that tasks have gone
    /// through.
    fn multiply(&self, out: &mut [f32], x: &[f32], operand: &Operand, matrices: &[CpuLinear], groups: &[Group]) -> u64 {
        let dense = |expert: usize| match &matrices[expert] {
            CpuLinear::Dense(matrix) => matrix,
            CpuLinear::Quantized(_) => unreachable!("experts are of one type"),
        };
        let quantized = |expert: usize| match &matrices[expert] {
            CpuLinear::Quantized(matrix) => matrix,
            CpuLinear::Dense(_) => unreachable!("experts are of one type"),
        };
        let panels = match self.kind(&matrices[0]) {
            Kind::F32 => linear::run_groups(self.product, out, x, groups, &dense, self.pool),
            Kind::Bf16(product, _) => linear_bf16::run_groups(product, out, &operand.bf16, groups, &dense, self.pool),
            Kind::Quantized(_) => {
                let product = self.quantized_product;
                quantized::run_groups(product, out, &operand.quantized, groups, &quantized, self.pool)
            }
        };
        // Panels of matrices of one shape and type are of one size.
        (panels * matrices[0].bytes() / matrices[0].rows().div_ceil(PANEL).max(1)) as u64
    }
}

impl Operand {
    fn round(&mut self, x: &[f32], rows: usize, like: &CpuLinear, machine: &Machine<'_>) -> Result<(), KernelError> {
        match machine.kind(like) {
            Kind::F32 => Ok(()),
            Kind::Bf16(_, matrix) => self.bf16.fill(x, rows, matrix.cols(), machine.pool),
            Kind::Quantized(matrix) => {
                let operand = machine.quantized_product.operand(matrix.scheme());
                self.quantized.fill(x, rows, matrix, operand, machine.pool)
            }
        }
    }
}

fn gather(to: &mut AlignedBuf<f32>, x: &[f32], rows: &[u32], cols: usize, pool: &ThreadPool) {
    let to = SendPtr(to.as_mut_ptr());
    CpuBackend::for_rows(pool, rows.len(), cols, &|place| {
        // SAFETY: there is a row for each place of a batch, and each is written by one task.
        let to = unsafe { std::slice::from_raw_parts_mut(to.get().add(place * cols), cols) };
        to.copy_from_slice(&x[rows[place] as usize * cols..][..cols]);
    });
}

fn apply_gate(gate: Gate, acts: &mut AlignedBuf<f32>, gate_up: &[f32], places: usize, inner: usize, pool: &ThreadPool) {
    let to = SendPtr(acts.as_mut_ptr());
    CpuBackend::for_rows(pool, places, inner, &|place| {
        let (g, u) = gate_up[place * 2 * inner..][..2 * inner].split_at(inner);
        // SAFETY: there is a row for each place, and each is written by one task.
        let out = unsafe { std::slice::from_raw_parts_mut(to.get().add(place * inner), inner) };
        // SAFETY: all are `inner` long; the variant was chosen for this machine.
        unsafe { gate.row(out, g, u) };
    });
}

/// Adds what the experts of a batch made of its `places` to the rows that chose them. The first batch starts the rows.
fn add_places(
    out: &mut CpuTensor,
    made: &[f32],
    place_of: &[u32],
    chosen: &[Chosen],
    places: Range<usize>,
    pool: &ThreadPool,
) {
    let (rows, cols) = (out.rows(), out.cols());
    let top_k = chosen.len() / rows;
    let to = SendPtr(out.values_mut().as_mut_ptr());
    // A decode's one row is shared too.
    const PART: usize = 1024;
    let parts = cols.div_ceil(PART);
    CpuBackend::for_rows(pool, rows * parts, PART.min(cols) * top_k, &|task| {
        let (row, first) = (task / parts, task % parts * PART);
        let width = PART.min(cols - first);
        // SAFETY: the part lies in row `row` of `out`, and each is written by one task.
        let out = unsafe { std::slice::from_raw_parts_mut(to.get().add(row * cols + first), width) };
        if places.start == 0 {
            out.fill(0.0);
        }
        for (place, choice) in place_of[row * top_k..][..top_k].iter().zip(&chosen[row * top_k..]) {
            if places.contains(&(*place as usize)) {
                let made = &made[(*place as usize - places.start) * cols + first..][..width];
                out.iter_mut().zip(made).for_each(|(out, made)| *out += choice.weight * made);
            }
        }
    });
}

/// See [`crate::Backend::add_gated`].
pub(super) fn add_gated(
    out: &mut CpuTensor,
    x: &CpuTensor,
    gate: Option<&CpuTensor>,
    pool: &ThreadPool,
) -> Result<(), KernelError> {
    const OP: &str = "add_gated";
    check(OP, "rows of x", out.rows(), x.rows())?;
    check(OP, "columns of x", out.cols(), x.cols())?;
    if let Some(gate) = gate {
        check(OP, "rows of the gate", x.rows(), gate.rows())?;
        check(OP, "columns of the gate", 1, gate.cols())?;
    }
    let (rows, cols) = (x.rows(), x.cols());
    let (x, to) = (x.values(), SendPtr(out.values_mut().as_mut_ptr()));
    CpuBackend::for_rows(pool, rows, cols, &|row| {
        // SAFETY: `out` has as many rows and columns as `x`, and each row is written by one task.
        let out = unsafe { std::slice::from_raw_parts_mut(to.get().add(row * cols), cols) };
        let weight = gate.map_or(1.0, |gate| 1.0 / (1.0 + (-gate.values()[row]).exp()));
        out.iter_mut().zip(&x[row * cols..][..cols]).for_each(|(out, x)| *out += weight * x);
    });
    Ok(())
}
