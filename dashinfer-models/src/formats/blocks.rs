//! Matrices in blocks of GGUF files: one tensor each, which says itself what it is.

use std::ops::Range;

use dashinfer_kernels::{BlockFormat, BlockMatrix, CodeLayout, StoredMatrix};

use super::{Module, Raw, StoredModule, Types, WeightsError, take};
use crate::StoredType;

/// How the weight of a module is stored, if it is in blocks.
pub(super) fn module(module: &Module<'_>) -> Option<StoredModule> {
    let Some(StoredType::Blocks(format)) = module.stored_type("weight") else { return None };
    let shape = module.shape;
    Some(StoredModule {
        tensors: vec![module.wanted("weight", shape, Types::Blocks(format))],
        layout: format.layout(),
        order: None,
        shape,
        label: format!("gguf {format}"),
        reader: super::Reader::Blocks(Reader { format }),
    })
}

pub(super) struct Reader {
    format: BlockFormat,
}

impl Reader {
    pub(super) fn open<'a>(
        &self,
        module: &StoredModule,
        raw: Vec<Raw<'a>>,
    ) -> Result<Box<dyn StoredMatrix + 'a>, WeightsError> {
        let [raw] = take(module, raw)?;
        let weights = Weights { format: self.format, shape: module.shape, raw };
        let [rows, cols] = module.shape;
        match weights.try_matrix() {
            Ok(_) => Ok(Box::new(weights)),
            Err(_) => Err(WeightsError::Value {
                name: module.tensors[0].name.clone(),
                wanted: format!("{rows} rows of {cols} weights in blocks of {}", self.format.block_len()),
                found: format!("{} bytes", weights.raw.bytes.len()),
            }),
        }
    }
}

/// The bytes, and what to make of them: it was seen, when they were read, that they are a matrix.
struct Weights<'a> {
    format: BlockFormat,
    shape: [usize; 2],
    raw: Raw<'a>,
}

impl Weights<'_> {
    fn try_matrix(&self) -> Result<BlockMatrix<'_>, dashinfer_kernels::KernelError> {
        BlockMatrix::new(self.format, &self.raw.bytes, self.shape[0], self.shape[1])
    }

    fn matrix(&self) -> BlockMatrix<'_> {
        self.try_matrix().expect("whoever opened it has made one")
    }
}

impl StoredMatrix for Weights<'_> {
    fn rows(&self) -> usize {
        self.shape[0]
    }

    fn cols(&self) -> usize {
        self.shape[1]
    }

    fn layout(&self) -> Option<CodeLayout> {
        self.format.layout()
    }

    fn values(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        self.matrix().values(rows, cols, out);
    }

    fn codes(&self, rows: Range<usize>, places: Range<usize>, out: &mut [u8]) {
        self.matrix().codes(rows, places, out);
    }

    fn params(&self, rows: Range<usize>, group: usize, scales: &mut [f32], zeros: &mut [u8]) {
        self.matrix().params(rows, group, scales, zeros);
    }
}
