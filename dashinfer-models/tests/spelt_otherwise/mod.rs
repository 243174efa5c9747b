//! Checkpoints of families that the reference has no code for, or that hold more than a decoder of text: made of a golden case whose
//! arithmetic they share, by other names, with matrices fused as they have them. The logits to expect are those of the case.

mod gemma3_with_images;
mod old_checkpoints;

use std::{borrow::Cow, collections::BTreeMap, path::Path};

use dashinfer_models::{
    Checkpoint, Decoder, HfConfig, ModelSpec, Quantization, StepLimits, StoredType, TensorInfo, WeightSource,
};
use serde_json::Value;

use crate::{
    Case, F32, cases,
    common::{
        reference::Reference,
        sequences::{Cached, Runner, Wanted},
    },
    cpu,
};
use dashinfer_kernels::{Backend, cpu::Isa};

/// Tensors in memory.
#[derive(Debug, Clone, Default)]
struct Tensors(BTreeMap<String, Tensor>);

#[derive(Debug, Clone)]
struct Tensor {
    info: TensorInfo,
    bytes: Vec<u8>,
}

impl WeightSource for Tensors {
    fn names(&self) -> Vec<&str> {
        self.0.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        Some(self.0.get(name)?.info.clone())
    }

    fn read(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        Some(Cow::Borrowed(&self.0.get(name)?.bytes))
    }
}

impl Tensors {
    fn of_folder(folder: &Path) -> Self {
        let checkpoint = Checkpoint::open(folder).unwrap();
        let tensor = |name: &str| {
            let bytes = checkpoint.read(name).unwrap().into_owned();
            (name.to_owned(), Tensor { info: checkpoint.info(name).unwrap(), bytes })
        };
        Self(checkpoint.names().into_iter().map(tensor).collect())
    }

    /// Calls every tensor what `name` makes of its name.
    fn rename(self, name: impl Fn(&str) -> String) -> Self {
        let number = self.0.len();
        let tensors: BTreeMap<_, _> = self.0.into_iter().map(|(old, tensor)| (name(&old), tensor)).collect();
        assert_eq!(tensors.len(), number, "two tensors got one name");
        Self(tensors)
    }

    /// Stacks the weights, and the biases, of the modules `parts` of each layer into those of one module.
    fn fuse(mut self, parts: &[&str], into: &str) -> Self {
        for kind in ["weight", "bias"] {
            for layer in 0.. {
                let name = |module: &str| format!("model.layers.{layer}.{module}.{kind}");
                let tensors: Vec<_> = parts.iter().filter_map(|part| self.0.remove(&name(part))).collect();
                let Some(first) = tensors.first() else { break };
                assert_eq!(tensors.len(), parts.len());
                let mut info = first.info.clone();
                info.shape[0] = tensors.iter().map(|tensor| tensor.info.shape[0]).sum();
                assert!(tensors.iter().all(|tensor| tensor.info.dtype == info.dtype));
                let bytes = tensors.into_iter().flat_map(|tensor| tensor.bytes).collect();
                self.0.insert(name(into), Tensor { info, bytes });
            }
        }
        self
    }

    /// Repeats each head of `head_dim` rows of some modules `times` times, which makes key/value heads of their own for query heads
    /// that shared one.
    fn repeat_heads(mut self, modules: &[&str], head_dim: usize, times: usize) -> Self {
        let chosen = |name: &str| modules.iter().any(|module| name.contains(&format!(".{module}.")));
        for (_, tensor) in self.0.iter_mut().filter(|(name, _)| chosen(name)) {
            let head_bytes = tensor.bytes.len() / tensor.info.shape[0] * head_dim;
            tensor.bytes = tensor.bytes.chunks_exact(head_bytes).flat_map(|head| head.repeat(times)).collect();
            tensor.info.shape[0] *= times;
        }
        self
    }

    /// Adds an arbitrary tensor.
    fn add(&mut self, name: &str, shape: &[usize]) {
        let dtype = StoredType::Float(dashinfer_kernels::DType::F32);
        let bytes = vec![1; shape.iter().product::<usize>() * 4];
        self.0.insert(name.to_owned(), Tensor { info: TensorInfo { dtype, shape: shape.to_vec() }, bytes });
    }
}

fn case(name: &str) -> Case {
    cases(F32).into_iter().find(|case| case.name() == name).unwrap()
}

/// The config of a case, which is one of transformers' own families.
fn config_of(case: &Case) -> Value {
    serde_json::from_slice(&std::fs::read(case.folder.join("config.json")).unwrap()).unwrap()
}

fn spec(config: &Value) -> ModelSpec {
    HfConfig::parse(&config.to_string()).unwrap().to_spec().unwrap()
}

fn load<B: Backend>(backend: B, spec: &ModelSpec, tensors: &Tensors) -> Decoder<B> {
    let limits = StepLimits { max_tokens: 512, max_logit_rows: 512 };
    Decoder::load(backend, spec.clone(), &mut tensors.clone(), limits, Quantization::NONE, &mut |_| ()).unwrap()
}

/// Whether a model of `spec` and `tensors` gives the logits of `case`, `fix` put right, on the reference backend and on the CPU's.
fn check(case: &Case, spec: &ModelSpec, tensors: &Tensors, fix: impl Fn(&mut [f32])) {
    check_on(case, &mut load(Reference::default(), spec, tensors), &fix);
    check_on(case, &mut load(cpu(Isa::best()).unwrap(), spec, tensors), &fix);
}

fn check_on<B: Cached>(case: &Case, decoder: &mut Decoder<B>, fix: &impl Fn(&mut [f32])) {
    for prompt in &case.prompts {
        let mut found = Runner::new(decoder, 1).step(&[(0, &prompt.ids)], Wanted::All);
        assert_eq!(found.len(), prompt.logits.len());
        for (found, wanted) in found.iter_mut().zip(&prompt.logits) {
            fix(found);
            case.assert_close(found, wanted, "spelt otherwise");
        }
    }
}
