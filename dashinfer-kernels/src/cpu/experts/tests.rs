use std::num::NonZeroUsize;

use proptest::prelude::*;

use super::*;
use crate::cpu::linear::to_bytes;
use crate::cpu::pool::PoolConfig;
use crate::cpu::{CpuConfig, Isa};
use crate::random::noise;
use crate::{
    Activation, Backend, CodeBits, CodeLayout, ExpertGroups, GroupScore, GroupedCodes, MatrixView, Scoring, TensorUse,
    route,
};

const ACTIVATION: Activation = Activation::Silu;

/// What an expert's weights are kept in.
#[derive(Debug, Clone, Copy)]
enum Kept {
    As(DType),
    In(Scheme),
}

fn backend(threads: usize, compute: DType, isa: Option<Isa>) -> Option<CpuBackend> {
    let pool = PoolConfig { threads: NonZeroUsize::new(threads), cores: Vec::new() };
    CpuBackend::new(&CpuConfig { pool, isa, compute }).ok()
}

fn tensor(backend: &CpuBackend, cols: usize, values: &[f32]) -> CpuTensor {
    let rows = values.len() / cols;
    let mut tensor = backend.tensor(rows, cols, TensorUse::Activations).unwrap();
    tensor.resize("test", rows, cols).unwrap();
    tensor.values_mut().copy_from_slice(values);
    tensor
}

struct Model {
    hidden: usize,
    inner: usize,
    routing: Routing,
    experts: CpuExperts,
    correction: Option<Vec<f32>>,
}

impl Model {
    fn new(
        backend: &CpuBackend,
        [hidden, inner]: [usize; 2],
        routing: Routing,
        kept: Kept,
        bias: bool,
        seed: u64,
    ) -> Self {
        let (dtype, scheme) = match kept {
            Kept::As(dtype) => (dtype, None),
            Kept::In(scheme) => (DType::BF16, Some(scheme)),
        };
        let pack = |rows: usize, cols: usize, seed: u64| {
            let bytes = to_bytes(&noise(rows * cols, seed), dtype);
            let view = MatrixView { bytes: &bytes, dtype, rows, cols };
            backend.pack(&[view], bias.then(|| noise(rows, !seed)).as_deref(), scheme).unwrap()
        };
        let of_experts = |rows: usize, cols: usize, seed: u64| -> Vec<CpuLinear> {
            (0..routing.num_experts as u64).map(|expert| pack(rows, cols, seed + expert)).collect()
        };
        let gate_up = of_experts(2 * inner, hidden, seed);
        let experts = backend.pack_experts(gate_up, of_experts(hidden, inner, seed + 1000)).unwrap();
        let correction = bias.then(|| noise(routing.num_experts, seed + 2000));
        Self { hidden, inner, routing, experts, correction }
    }

    fn run(&self, backend: &mut CpuBackend, scratch: &mut CpuExpertScratch, x: &[f32], logits: &[f32]) -> Vec<f32> {
        let x = tensor(backend, self.hidden, x);
        let logits = tensor(backend, self.routing.num_experts, logits);
        let mut out = tensor(backend, self.hidden, &vec![f32::NAN; x.values().len()]);
        let correction = self.correction.as_ref();
        backend.experts(&mut out, &x, &logits, correction, &self.experts, &self.routing, ACTIVATION, scratch).unwrap();
        out.values().to_vec()
    }

    /// The definition, by the operators of the same backend on one row at a time.
    fn plain(&self, backend: &mut CpuBackend, x: &[f32], logits: &[f32]) -> Vec<f32> {
        let (n, routing) = (self.routing.num_experts, &self.routing);
        let mut all = Vec::new();
        for (x, logits) in x.chunks(self.hidden).zip(logits.chunks(n)) {
            let mut chosen = vec![Chosen::default(); routing.top_k];
            let mut scratch = vec![0.0; routing.scratch_len()];
            route(&mut chosen, logits, self.correction.as_deref(), routing, &mut scratch).unwrap();
            let mut sum = vec![0.0f32; self.hidden];
            let x = tensor(backend, self.hidden, x);
            for Chosen { expert, weight } in chosen {
                let [mut gate_up, mut acts, mut made] = [2 * self.inner, self.inner, self.hidden]
                    .map(|cols| backend.tensor(1, cols, TensorUse::Activations).unwrap());
                backend.linear(&mut gate_up, &x, &self.experts.gate_up[expert as usize]).unwrap();
                backend.gate(&mut acts, &gate_up, ACTIVATION).unwrap();
                backend.linear(&mut made, &acts, &self.experts.down[expert as usize]).unwrap();
                sum.iter_mut().zip(made.values()).for_each(|(sum, made)| *sum += weight * made);
            }
            all.extend(sum);
        }
        all
    }
}

fn routing(num_experts: usize, top_k: usize) -> Routing {
    Routing { num_experts, top_k, scoring: Scoring::Softmax, groups: None, normalize: true, scale: 1.5 }
}

fn all_kept() -> impl Iterator<Item = Kept> {
    let dense = [DType::F32, DType::F16, DType::BF16].map(Kept::As);
    dense.into_iter().chain(Scheme::ALL.iter().map(|scheme| Kept::In(*scheme)))
}

proptest! {
    #![proptest_config(crate::random::cases(32))]

    #[test]
    fn it_is_the_sum_over_the_chosen_to_the_bit(
        rows in 0usize..9, hidden in 1usize..70, inner in 1usize..70, num_experts in 1usize..7, top_k in 1usize..4,
        threads in 1usize..4, scalar: bool, bf16: bool, bias: bool, seed: u64,
    ) {
        let compute = if bf16 { DType::BF16 } else { DType::F32 };
        let Some(mut backend) = backend(threads, compute, scalar.then_some(Isa::Scalar)) else { return Ok(()) };
        let routing = routing(num_experts, top_k.min(num_experts));
        let seed = seed >> 8;
        for kept in all_kept() {
            let model = Model::new(&backend, [hidden, inner], routing, kept, bias, seed);
            let mut scratch = backend.expert_scratch(rows + 1, hidden, inner, &routing).unwrap();
            let (x, logits) = (noise(rows * hidden, seed + 7), noise(rows * num_experts, seed + 8));
            let found = model.run(&mut backend, &mut scratch, &x, &logits);
            prop_assert_eq!(found, model.plain(&mut backend, &x, &logits), "{:?}", kept);
        }
    }
}

/// Steps go through the panels of the experts that their rows chose, once, and through no others.
#[test]
fn what_is_read_is_what_was_chosen() {
    let mut backend = backend(2, DType::F32, None).unwrap();
    let (hidden, inner, routing) = (40, 24, routing(6, 2));
    for kept in all_kept() {
        let model = Model::new(&backend, [hidden, inner], routing, kept, false, 5);
        let expert = (model.experts.gate_up[0].bytes() + model.experts.down[0].bytes()) as u64;
        let mut scratch = backend.expert_scratch(30, hidden, inner, &routing).unwrap();
        // The first rows want experts 1 and 4, the third 4 and 5.
        let wants = [[1, 4], [1, 4], [4, 5]];
        for (rows, distinct) in [(1, 2), (2, 2), (3, 3), (0, 0)] {
            let mut logits = vec![0.0; rows * 6];
            for (logits, wants) in logits.chunks_mut(6).zip(wants) {
                wants.into_iter().for_each(|expert| logits[expert] = 5.0);
            }
            let before = backend.weight_reads().unwrap();
            model.run(&mut backend, &mut scratch, &noise(rows * hidden, 3), &logits);
            let after = backend.weight_reads().unwrap();
            assert_eq!(after.chosen_experts - before.chosen_experts, distinct * expert, "{kept:?}");
            assert_eq!(after.experts - before.experts, distinct * expert, "{kept:?}");
            assert_eq!(after.matrices, before.matrices);
        }
    }
}

#[test]
fn many_rows_go_in_batches_and_change_no_bit() {
    for compute in [DType::F32, DType::BF16] {
        let Some(mut backend) = backend(2, compute, None) else { continue };
        let groups = Some(ExpertGroups { num_groups: 4, top_groups: 3, score: GroupScore::TopTwo });
        let routing = Routing { scoring: Scoring::Sigmoid, groups, ..routing(16, 5) };
        let (rows, hidden, inner) = (700, 33, 17);
        assert!(batch_places(rows, routing.top_k) < rows * routing.top_k, "more than one batch");
        let (x, logits) = (noise(rows * hidden, 1), noise(rows * 16, 2));
        for kept in all_kept() {
            let model = Model::new(&backend, [hidden, inner], routing, kept, true, 3);
            let mut scratch = backend.expert_scratch(rows, hidden, inner, &routing).unwrap();
            let all = model.run(&mut backend, &mut scratch, &x, &logits);
            let some = [0, 1, 15, 16, 350, 699];
            for row in some {
                let (x, logits) = (&x[row * hidden..][..hidden], &logits[row * 16..][..16]);
                let alone = model.run(&mut backend, &mut scratch, x, logits);
                assert_eq!(alone, all[row * hidden..][..hidden], "{kept:?} row {row}");
                assert_eq!(alone, model.plain(&mut backend, x, logits), "{kept:?} row {row}");
            }
        }
    }
}

#[test]
fn a_step_takes_no_more_memory_than_was_said() {
    let backend = backend(1, DType::F32, None).unwrap();
    for (rows, hidden, inner) in [(1, 64, 32), (600, 64, 200), (5000, 64, 32)] {
        let routing = routing(8, 2);
        let scratch = backend.expert_scratch(rows, hidden, inner, &routing).unwrap();
        let buffers = 4 * (scratch.wide.len() + scratch.gate_up.len() + scratch.acts.len());
        let lists = 4 * (scratch.scores.capacity() + scratch.plan.rows.capacity() + scratch.plan.places.capacity())
            + 8 * scratch.chosen.capacity();
        let rounded = Activations::max_bytes(scratch.most, hidden.max(inner)) + Activations::max_bytes(rows, hidden);
        assert_eq!(buffers + lists + rounded, expert_bytes(rows, hidden, inner, &routing));
    }
    assert!(expert_bytes(usize::MAX, usize::MAX, usize::MAX, &routing(8, 2)) > 1 << 50, "saturates");
}

#[test]
fn what_does_not_fit_is_refused() {
    let backend = backend(1, DType::F32, None).unwrap();
    let pack = |rows: usize, cols: usize, dtype: DType| {
        let view = MatrixView { bytes: &vec![0; rows * cols * dtype.size_bytes()], dtype, rows, cols };
        backend.pack(&[view], None, None).unwrap()
    };
    let error = |gate_up: Vec<CpuLinear>, down| backend.pack_experts(gate_up, down).unwrap_err().to_string();
    let (up, down) = (|| pack(6, 4, DType::F32), || pack(4, 3, DType::F32));
    assert_eq!(error(vec![], vec![]), "pack_experts: experts should be 1, found 0");
    assert_eq!(error(vec![up()], vec![]), "pack_experts: number of down matrices should be 1, found 0");
    assert_eq!(
        error(vec![pack(5, 4, DType::F32)], vec![down()]),
        "pack_experts: rows of gate and up should be 6, found 5"
    );
    assert_eq!(error(vec![up()], vec![pack(5, 3, DType::F32)]), "pack_experts: rows of down should be 4, found 5");
    let other = vec![up(), pack(6, 4, DType::F16)];
    assert_eq!(
        error(other, vec![down(), down()]),
        "pack_experts: experts of different types in one layer is not supported by the cpu backend"
    );
    let ordered = |order: &[u32]| {
        let layout = CodeLayout { bits: CodeBits::Four, group: Some(32), zero_points: false };
        let codes = GroupedCodes::new([6, 4], layout, &[0; 24], &[1.0; 6], &[]).unwrap().with_order(order);
        backend.pack_stored(&[&codes], None, Scheme::holding(&[layout])).unwrap()
    };
    assert_eq!(
        error(vec![ordered(&[1, 0, 2, 3]), ordered(&[0, 1, 3, 2])], vec![down(), down()]),
        "pack_experts: experts of one layer whose input features stand in different orders is not supported by the cpu \
         backend"
    );
    let routing = routing(4, 5);
    let found = backend.expert_scratch(1, 4, 3, &routing).unwrap_err().to_string();
    assert_eq!(found, "expert_scratch: experts should be 5, found 4");
}

#[test]
fn operands_of_other_shapes_are_refused() {
    let mut backend = backend(1, DType::F32, None).unwrap();
    let facts = routing(3, 2);
    let model = Model::new(&backend, [4, 3], facts, Kept::As(DType::F32), false, 1);
    let mut scratch = backend.expert_scratch(2, 4, 3, &facts).unwrap();
    let mut error = |rows: usize, cols: usize, logit_rows: usize, n: usize, routing: &Routing| {
        let x = tensor(&backend, cols, &vec![0.0; rows * cols]);
        let logits = tensor(&backend, n, &vec![0.0; logit_rows * n]);
        let mut out = backend.tensor(8, 4, TensorUse::Activations).unwrap();
        let run = backend.experts(&mut out, &x, &logits, None, &model.experts, routing, ACTIVATION, &mut scratch);
        run.unwrap_err().to_string()
    };
    assert_eq!(error(2, 5, 2, 3, &facts), "experts: columns of x should be 4, found 5");
    assert_eq!(error(2, 4, 1, 3, &facts), "experts: rows of logits should be 2, found 1");
    assert_eq!(error(2, 4, 2, 4, &facts), "experts: columns of logits should be 3, found 4");
    assert_eq!(error(2, 4, 2, 4, &routing(4, 2)), "experts: experts should be 4, found 3");
    assert_eq!(error(2, 4, 2, 3, &routing(3, 1)), "experts: experts of each row in the scratch should be 1, found 2");
    assert_eq!(error(3, 4, 3, 3, &facts), "experts: room for rows in the scratch should be 3, found 2");
}

#[test]
fn a_shared_experts_part_is_added_through_its_gate() {
    let mut backend = backend(1, DType::F32, None).unwrap();
    let (x, gate) = (tensor(&backend, 2, &[1.0, 2.0, 3.0, 4.0]), tensor(&backend, 1, &[0.0, -200.0]));
    let mut out = tensor(&backend, 2, &[10.0; 4]);
    backend.add_gated(&mut out, &x, Some(&gate)).unwrap();
    assert_eq!(out.values(), [10.5, 11.0, 10.0, 10.0]);
    backend.add_gated(&mut out, &x, None).unwrap();
    assert_eq!(out.values(), [11.5, 13.0, 13.0, 14.0]);
    let error = backend.add_gated(&mut out, &gate, None).unwrap_err().to_string();
    assert_eq!(error, "add_gated: columns of x should be 2, found 1");
}
