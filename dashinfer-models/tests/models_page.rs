//! `docs/models.md` says what the registry of families says: its table is made here and compared. To write it anew:
//! `DASHINFER_WRITE_DOCS=1 cargo test -p dashinfer-models --test models_page`.
#![allow(clippy::unwrap_used)] // helpers of tests are tests

use std::{fmt::Write as _, fs, path::Path};

use dashinfer_kernels::{
    Backend, Feature,
    cpu::{CpuBackend, CpuConfig},
};
use dashinfer_models::{FAMILIES, Family, HfConfig, ModelSpec};

const BEGIN: &str = "<!-- families: made by tests/models_page.rs -->\n";
const END: &str = "<!-- end of families -->\n";

fn spec(family: &Family) -> ModelSpec {
    let mut config: serde_json::Value = serde_json::from_str(family.example.config).unwrap();
    config["architectures"] = [family.architecture].into_iter().collect();
    HfConfig::parse(&config.to_string()).unwrap().to_spec().unwrap()
}

/// `yes`, or what a device lacks.
fn verdict(spec: &ModelSpec, has: impl Fn(Feature) -> bool) -> String {
    let lacking = spec.features().into_iter().filter(|feature| !has(*feature)).map(|feature| feature.to_string());
    match lacking.collect::<Vec<_>>().join(", ") {
        nothing if nothing.is_empty() => "yes".to_owned(),
        lacking => format!("no: {lacking}"),
    }
}

fn table() -> String {
    let cpu = CpuBackend::new(&CpuConfig::default()).unwrap();
    let mut table = "\
        | family | `architectures` | for example | parameters | CPU | NVIDIA GPU |\n\
        |---|---|---|---|---|---|\n"
        .to_owned();
    for family in FAMILIES {
        let spec = spec(family);
        let billions = spec.num_parameters() as f64 / 1e9;
        let (on_cpu, on_gpu) = (verdict(&spec, |feature| cpu.supports(feature)), verdict(&spec, Feature::on_gpus));
        let Family { name, architecture, example, .. } = family;
        writeln!(table, "| {name} | `{architecture}` | {} | {billions:.1}B | {on_cpu} | {on_gpu} |", example.model)
            .unwrap();
    }
    table
}

#[test]
fn the_page_says_what_the_registry_says() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/models.md");
    let page = fs::read_to_string(&path).unwrap();
    let (before, rest) = page.split_once(BEGIN).expect("the page has a place for the table");
    let (found, after) = rest.split_once(END).expect("the place ends");
    let table = table();
    if found != table {
        if std::env::var_os("DASHINFER_WRITE_DOCS").is_some() {
            fs::write(&path, format!("{before}{BEGIN}{table}{END}{after}")).unwrap();
            return;
        }
        panic!("docs/models.md is out of date; DASHINFER_WRITE_DOCS=1 writes this table:\n{table}");
    }
}

#[test]
fn a_family_is_named_once() {
    let mut names: Vec<_> = FAMILIES.iter().map(|family| family.architecture).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), FAMILIES.len());
}
