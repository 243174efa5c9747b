//! The tests as programs in a folder, to be run on a machine that has a GPU and perhaps no Rust.

use std::error::Error;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::workspace;

/// The crates whose tests use a GPU.
const PACKAGES: [&str; 3] = ["dashinfer-kernels", "dashinfer-models", "dashinfer"];
/// What the tests read, in the workspace.
const DATA: [&str; 2] = ["dashinfer-models/tests/goldens", "examples/models"];

/// A test program.
#[derive(Debug, PartialEq, Eq)]
struct Program {
    /// `kernels`, `models-goldens`: the package without `dashinfer-`, and the file of an integration test.
    name: String,
    executable: String,
}

/// Builds the tests of all crates with CUDA, and puts those whose name contains one of `only` into `out`.
pub(crate) fn build(out: &Path, only: &[String], with_data: bool) -> Result<bool, Box<dyn Error>> {
    let workspace = workspace();
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(&workspace).args(["test", "--release", "--no-run", "--lib", "--tests"]);
    cargo.args(["--message-format", "json-render-diagnostics"]);
    for package in packages(only) {
        cargo.args(["--package", package, "--features", &format!("{package}/cuda")]);
    }
    let built = cargo.stderr(Stdio::inherit()).output()?;
    if !built.status.success() {
        return Err("the tests do not build".into());
    }
    let mut programs: Vec<Program> = String::from_utf8(built.stdout)?.lines().filter_map(program).collect();
    programs.sort_by(|a, b| a.name.cmp(&b.name));
    programs.retain(|program| only.is_empty() || only.iter().any(|part| program.name.contains(part)));
    if programs.is_empty() {
        return Err("there is no such test program".into());
    }

    if out.join("run.sh").is_file() {
        fs::remove_dir_all(out)?; // an earlier one
    }
    fs::create_dir_all(out.join("bin"))?;
    for Program { name, executable } in &programs {
        let to = out.join("bin").join(name);
        fs::copy(executable, &to)?;
        // Without `strip` it is as good, and larger.
        let _ = Command::new("strip").arg(&to).status();
        println!("{:10} bytes  {name}", to.metadata()?.len());
    }
    if with_data {
        for folder in DATA {
            copy_folder(&workspace.join(folder), &out.join("data").join(folder))?;
        }
    }
    let script = include_str!("run.sh").replace("@WORKSPACE@", &workspace.display().to_string());
    fs::write(out.join("run.sh"), script)?;
    make_executable(&out.join("run.sh"))?;
    println!("{} programs in {}", programs.len(), out.display());
    Ok(true)
}

/// The crates that programs of these names can be of.
fn packages(only: &[String]) -> Vec<&'static str> {
    let is_of = |package: &str| {
        let short = short_name(package);
        only.is_empty() || only.iter().any(|part| short.contains(part.as_str()) || part.starts_with(short))
    };
    let found: Vec<&str> = PACKAGES.into_iter().filter(|package| is_of(package)).collect();
    if found.is_empty() { PACKAGES.to_vec() } else { found }
}

fn short_name(package: &str) -> &str {
    package.strip_prefix("dashinfer-").unwrap_or(package)
}

/// The test program that a line of cargo's messages tells of.
fn program(line: &str) -> Option<Program> {
    if !line.contains(r#""reason":"compiler-artifact""#) {
        return None;
    }
    let executable = value(line, "executable")?;
    // ".../dashinfer-models/Cargo.toml"
    let package = Path::new(value(line, "manifest_path")?).parent()?.file_name()?.to_str()?;
    let target = &line[line.find(r#""target":{"#)?..];
    let package = short_name(package);
    let name = match target.contains(r#""kind":["test"]"#) {
        true => format!("{package}-{}", value(target, "name")?),
        false => package.to_string(),
    };
    Some(Program { name, executable: executable.to_string() })
}

/// The text behind `"key":`, if it is a text. Cargo's paths and names have nothing that JSON would escape.
fn value<'a>(json: &'a str, key: &str) -> Option<&'a str> {
    let start = format!(r#""{key}":""#);
    let rest = &json[json.find(&start)? + start.len()..];
    rest.split('"').next()
}

fn copy_folder(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let to = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_folder(&entry.path(), &to)?;
        } else {
            fs::copy(entry.path(), &to)?;
        }
    }
    Ok(())
}

#[cfg(unix)]
fn make_executable(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
}

#[cfg(not(unix))]
fn make_executable(_: &Path) -> std::io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_crates_of_the_wanted_programs_are_built() {
        let built = |only: &[&str]| packages(&only.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert_eq!(built(&[]), PACKAGES);
        assert_eq!(built(&["kernels"]), ["dashinfer-kernels"]);
        assert_eq!(built(&["models-goldens", "dashinfer-determinism"]), ["dashinfer-models", "dashinfer"]);
        assert_eq!(built(&["goldens"]), PACKAGES);
    }

    #[test]
    fn programs_are_read_from_cargos_messages() {
        let unit = r#"{"reason":"compiler-artifact","package_id":"path+file:///w/dashinfer-kernels#0.1.0","manifest_path":"/w/dashinfer-kernels/Cargo.toml","target":{"kind":["lib"],"crate_types":["lib"],"name":"dashinfer_kernels","src_path":"/w/dashinfer-kernels/src/lib.rs","edition":"2024","test":true},"profile":{"opt_level":"3","test":true},"features":["cuda"],"filenames":["/t/release/deps/dashinfer_kernels-1"],"executable":"/t/release/deps/dashinfer_kernels-1","fresh":true}"#;
        let found = |line: &str| program(line).map(|program| (program.name, program.executable));
        let wanted = |name: &str, path: &str| Some((name.to_string(), path.to_string()));
        assert_eq!(found(unit), wanted("kernels", "/t/release/deps/dashinfer_kernels-1"));
        let integration = unit
            .replace("dashinfer-kernels", "dashinfer")
            .replace(r#""kind":["lib"]"#, r#""kind":["test"]"#)
            .replace(r#""name":"dashinfer_kernels""#, r#""name":"goldens""#);
        assert_eq!(found(&integration), wanted("dashinfer-goldens", "/t/release/deps/dashinfer_kernels-1"));
        let library = unit.replace(r#""executable":"/t/release/deps/dashinfer_kernels-1""#, r#""executable":null"#);
        assert_eq!(found(&library), None);
        assert_eq!(found(r#"{"reason":"build-finished","success":true}"#), None);
    }
}
