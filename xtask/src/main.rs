//! Chores of the workspace that cargo has no command for; see [`USAGE`].

#![expect(clippy::print_stdout, reason = "what it finds is its output")]

mod gpu_tests;
mod jobs;
mod kernels;
mod ptxas;
mod spills;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use dashinfer_kernels::cuda::Arch;

const USAGE: &str = "\
usage: cargo xtask COMMAND [OPTION ...]

kernels check     compiles every CUDA kernel in every variant, and fails on errors and on spilled registers that are not
                  listed in dashinfer-kernels/cuda/spills.txt. Needs NVRTC and no GPU; NVRTC 12 for sm_70
kernels images    compiles them into one archive, for machines without a compiler
  --out FILE      where to write the archive
  --dump FOLDER   writes each CUBIN to a file of its own, too or instead
  --cuda MAJOR    use NVRTC of this major version of CUDA or older (default: the first that is found): a driver loads what was
                  compiled by its own major version or an older one
both:
  --arch ARCH     for this architecture (sm_80, 90a), and not for all; may be repeated
  --unit FILE     only this file (rms_norm.cu); may be repeated
  --verbose       a line for each kernel: registers, stack, spilled bytes
  --jobs N        threads (default: one for each core)

gpu-tests         builds the tests of all crates with CUDA, to be carried to a machine with a GPU and run there by run.sh
  --out FOLDER    where to put them; the folder is emptied
  --only NAME     only test programs whose names contain this (kernels, models-goldens); may be repeated
  --without-data  leave the checkpoints out: run.sh is told where a checkout is
";

fn main() -> ExitCode {
    let mut args = Arguments(std::env::args().skip(1).collect());
    if args.0.is_empty() || args.flag("--help") {
        print!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    match run(&mut args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::from(2)
        }
    }
}

/// Whether all that was checked is well.
fn run(args: &mut Arguments) -> Result<bool, Box<dyn Error>> {
    let command = args.command();
    match (command.first().map(String::as_str), command.get(1).map(String::as_str)) {
        (Some("kernels"), Some(what @ ("check" | "images"))) => {
            let selection = kernels::Selection {
                archs: args.values("--arch")?.iter().map(|text| arch(text)).collect::<Result<_, _>>()?,
                units: args.values("--unit")?,
                is_verbose: args.flag("--verbose"),
                num_threads: args.number("--jobs")?,
            };
            if what == "check" {
                args.finish()?;
                return kernels::check(&selection);
            }
            let path = |text: Option<String>| text.map(PathBuf::from);
            let (out, dump) = (path(args.values("--out")?.pop()), path(args.values("--dump")?.pop()));
            let newest = args.number("--cuda")?;
            args.finish()?;
            if out.is_none() && dump.is_none() {
                return Err("kernels images needs --out FILE or --dump FOLDER".into());
            }
            kernels::images(&selection, out.as_deref(), dump.as_deref(), newest)
        }
        (Some("gpu-tests"), None) => {
            let (out, only) = (args.values("--out")?.pop(), args.values("--only")?);
            let with_data = !args.flag("--without-data");
            args.finish()?;
            gpu_tests::build(Path::new(&out.ok_or("gpu-tests needs --out FOLDER")?), &only, with_data)
        }
        _ => Err(format!("there is no command {:?}\n\n{USAGE}", command.join(" ")).into()),
    }
}

fn arch(text: &str) -> Result<Arch, String> {
    Arch::parse(text).ok_or_else(|| format!("{text} is no architecture; sm_80 and sm_90a are"))
}

/// The workspace's folder.
fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("this package is a folder of the workspace").to_path_buf()
}

/// The words that nobody has asked for yet.
struct Arguments(Vec<String>);

impl Arguments {
    /// The words before the first option.
    fn command(&mut self) -> Vec<String> {
        let len = self.0.iter().position(|word| word.starts_with('-')).unwrap_or(self.0.len());
        self.0.drain(..len).collect()
    }

    fn flag(&mut self, name: &str) -> bool {
        let before = self.0.len();
        self.0.retain(|word| word != name);
        self.0.len() < before
    }

    /// The values of `--name VALUE`, as often as it is there.
    fn values(&mut self, name: &str) -> Result<Vec<String>, String> {
        let mut values = Vec::new();
        while let Some(at) = self.0.iter().position(|word| word == name) {
            if at + 1 >= self.0.len() {
                return Err(format!("{name} needs a value"));
            }
            values.extend(self.0.drain(at..at + 2).nth(1));
        }
        Ok(values)
    }

    fn number<N: std::str::FromStr>(&mut self, name: &str) -> Result<Option<N>, String> {
        let value = self.values(name)?.pop();
        value.map(|text| text.parse().map_err(|_| format!("{name} {text} is no number"))).transpose()
    }

    fn finish(&self) -> Result<(), String> {
        if self.0.is_empty() { Ok(()) } else { Err(format!("what is {}?\n\n{USAGE}", self.0.join(" "))) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_a_command_then_options_in_any_order() {
        let words = "kernels check --arch sm_80 --verbose --arch 90a --jobs 3";
        let mut args = Arguments(words.split(' ').map(str::to_string).collect());
        assert_eq!(args.command(), ["kernels", "check"]);
        assert!(args.flag("--verbose") && !args.flag("--verbose"));
        assert!(args.finish().is_err());
        assert_eq!(args.number("--jobs"), Ok(Some(3)));
        assert_eq!(args.values("--arch").unwrap(), ["sm_80", "90a"]);
        assert_eq!(args.finish(), Ok(()));
        let mut args = Arguments(vec!["--arch".to_string()]);
        assert!(args.values("--arch").is_err());
    }
}
