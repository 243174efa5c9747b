//! Models in several files: `name-00001-of-00003.gguf` and so on. The first has all metadata, each some of the tensors.

use std::{collections::BTreeSet, path::Path};

use super::{GgufFault, file::GgufFile};
use crate::{CheckpointError, ConfigError};

/// Opens the file at `path`, and the others if it is the first of several.
pub(super) fn open(path: &Path) -> Result<Vec<GgufFile>, CheckpointError> {
    let first = GgufFile::open(path)?;
    let (number, count) = numbers(&first)?;
    if count <= 1 {
        return Ok(vec![first]);
    }
    let fault = |path: &Path, number, wanted: String, found: String| {
        let fault = GgufFault::Split { number, count, wanted, found };
        CheckpointError::Gguf { path: path.into(), fault }
    };
    let suffix = format!("-00001-of-{count:05}.gguf");
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let Some(prefix) = name.strip_suffix(&suffix).filter(|_| number == 1) else {
        return Err(fault(path, number, format!("the first of them, with a name that ends in {suffix}"), name.into()));
    };
    let mut names: BTreeSet<String> = first.tensors().keys().cloned().collect();
    let mut files = vec![first];
    for number in 2..=count {
        let path = path.with_file_name(format!("{prefix}-{number:05}-of-{count:05}.gguf"));
        let file = match GgufFile::open(&path) {
            Err(CheckpointError::Read { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                return Err(fault(&path, number, "it beside the first".to_owned(), "nothing".to_owned()));
            }
            other => other?,
        };
        let found = numbers(&file)?;
        if found != (number, count) {
            return Err(fault(&path, number, "these numbers in its metadata".to_owned(), format!("{found:?}")));
        }
        for name in file.tensors().keys() {
            if !names.insert(name.clone()) {
                return Err(fault(&path, number, format!("tensor {name} in one file"), "it in two".to_owned()));
            }
        }
        files.push(file);
    }
    Ok(files)
}

/// Which file it is, from 1, and of how many.
fn numbers(file: &GgufFile) -> Result<(u64, u64), CheckpointError> {
    let (metadata, path) = (file.metadata(), file.path());
    let count = |key| metadata.count(key).map_err(|error| invalid(path, &error));
    Ok((count("split.no")?.unwrap_or(0).saturating_add(1), count("split.count")?.unwrap_or(1)))
}

fn invalid(path: &Path, error: &ConfigError) -> CheckpointError {
    let fault = match error {
        ConfigError::Value { field, wanted, found } => {
            GgufFault::Value { what: field.clone(), wanted: wanted.clone(), found: found.clone() }
        }
        other => GgufFault::Value { what: "split".into(), wanted: "whole numbers".into(), found: other.to_string() },
    };
    CheckpointError::Gguf { path: path.into(), fault }
}
