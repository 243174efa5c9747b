//! Compiles every kernel in every variant for every architecture: to check them, or to ship them.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use dashinfer_kernels::KernelError;
use dashinfer_kernels::cuda::Arch;
use dashinfer_kernels::cuda::tools::{self, Compiled, Images, Nvrtc, UNITS, Unit};

use crate::{jobs, ptxas, spills, workspace};

/// The list of accepted spills, in the workspace.
pub(crate) const SPILLS: &str = "dashinfer-kernels/cuda/spills.txt";

/// One of each generation, and each whose instructions no other has.
const CHECKED: &[Arch] =
    &[Arch::SM70, Arch::SM75, Arch::SM80, Arch::SM86, Arch::SM89, Arch::SM90, Arch::SM100, Arch::SM120];
/// Also those that run no other's code.
const SHIPPED: &[Arch] = &[
    Arch::SM70,
    Arch::SM75,
    Arch::SM80,
    Arch::SM86,
    Arch::SM89,
    Arch::SM90,
    Arch::SM100,
    Arch::new(10, 3),
    Arch::SM120,
];
/// Lines of a compiler's log that are printed.
const MAX_LOG_LINES: usize = 40;

/// What to compile.
pub(crate) struct Selection {
    /// Empty for all.
    pub(crate) archs: Vec<Arch>,
    /// Empty for all.
    pub(crate) units: Vec<String>,
    pub(crate) is_verbose: bool,
    pub(crate) num_threads: Option<usize>,
}

/// One compilation.
struct Job<'a> {
    /// Which unit for which architecture: a line of the output.
    group: usize,
    unit: &'static Unit,
    arch: Arch,
    nvrtc: &'a Nvrtc,
    options: Vec<String>,
}

/// What has come of a group so far.
#[derive(Default)]
struct Progress {
    num_done: usize,
    num_kernels: usize,
    max_registers: u32,
    num_bytes: usize,
    time: Duration,
    problems: Vec<String>,
    notes: Vec<String>,
}

/// Compiles and judges; prints a line for each unit and architecture.
pub(crate) fn check(selection: &Selection) -> Result<bool, Box<dyn Error>> {
    let path = workspace().join(SPILLS);
    let text = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let allowed = spills::parse(&text)?;
    let mut used = vec![false; allowed.len()];
    let judge = |job: &Job<'_>, kernel: &ptxas::Usage| {
        let arch = job.arch.target();
        let about =
            |list: &[spills::Allowed]| list.iter().position(|line| line.is_about(job.unit.name, &job.options, &arch));
        match about(&allowed) {
            Some(line) if allowed[line].allows(kernel.spilled_bytes) => {
                used[line] = true;
                true
            }
            _ => false,
        }
    };
    let (num_passed, mut num_failed, _) = compile_all(selection, CHECKED, None, judge)?;
    if selection.archs.is_empty() && selection.units.is_empty() {
        for (line, _) in allowed.iter().zip(&used).filter(|(_, used)| !**used) {
            println!("line {} of {SPILLS} allows what no kernel spills", line.line);
            num_failed += 1;
        }
    }
    println!("{num_passed} passed, {num_failed} failed");
    Ok(num_failed == 0)
}

/// Writes what is compiled: to an archive, which is read back, and to a file for each compilation.
pub(crate) fn images(
    selection: &Selection,
    out: Option<&Path>,
    dump: Option<&Path>,
    newest: Option<u32>,
) -> Result<bool, Box<dyn Error>> {
    let (num_passed, num_failed, images) = compile_all(selection, SHIPPED, newest, |_, _| true)?;
    if let Some(folder) = dump {
        fs::create_dir_all(folder)?;
        for (unit, arch, options, cubin) in &images {
            let stem = unit.name.trim_end_matches(".cu");
            let options = options.iter().map(|option| option.trim_start_matches("-D")).collect::<Vec<_>>().join(",");
            fs::write(folder.join(format!("{stem}.{}.{options}.cubin", arch.target())), cubin)?;
        }
    }
    if let (Some(out), 0) = (out, num_failed) {
        let num_images = images.len();
        let archive = tools::archive(images);
        fs::write(out, &archive).map_err(|error| format!("{}: {error}", out.display()))?;
        if Images::open(out)?.len() != num_images {
            return Err("two images have one name".into());
        }
        println!("{num_images} images, {} bytes, in {}", archive.len(), out.display());
    }
    println!("{num_passed} passed, {num_failed} failed");
    Ok(num_failed == 0)
}

type Image = (&'static Unit, Arch, Vec<String>, Vec<u8>);

/// Compiles what is selected. `accepts` judges a kernel that spills.
fn compile_all(
    selection: &Selection,
    default_archs: &[Arch],
    newest: Option<u32>,
    mut accepts: impl FnMut(&Job<'_>, &ptxas::Usage) -> bool,
) -> Result<(usize, usize, Vec<Image>), Box<dyn Error>> {
    for name in &selection.units {
        if !UNITS.iter().any(|listed| listed.unit.name == name) {
            let known: Vec<&str> = UNITS.iter().map(|listed| listed.unit.name).collect();
            return Err(format!("there is no {name}; there are {}", known.join(", ")).into());
        }
    }
    let archs = if selection.archs.is_empty() { default_archs } else { &selection.archs };
    let compilers = compilers(archs, newest)?;
    let is_selected = |unit: &Unit| selection.units.is_empty() || selection.units.iter().any(|name| name == unit.name);
    let (mut jobs, mut sizes, mut progress) = (Vec::new(), Vec::new(), Vec::<Progress>::new());
    for &arch in archs {
        for listed in UNITS.iter().filter(|listed| is_selected(listed.unit) && listed.archs.contains(arch)) {
            let (unit, nvrtc) = (listed.unit, &compilers[&arch]);
            let compilations = listed.compilations(arch);
            sizes.push(compilations.len());
            let group = progress.len();
            progress.push(Progress::default());
            jobs.extend(compilations.into_iter().map(|options| Job { group, unit, arch, nvrtc, options }));
        }
    }

    let (mut num_passed, mut num_failed, mut images) = (0, 0, Vec::with_capacity(jobs.len()));
    let started = Instant::now();
    let compile = |job: &Job<'_>| {
        let start = Instant::now();
        let options: Vec<&str> = job.options.iter().map(String::as_str).collect();
        let compiled = tools::compile(job.nvrtc, job.unit, job.arch, &options, &["--ptxas-options=-v"]);
        (compiled, start.elapsed())
    };
    jobs::run(&jobs, selection.num_threads, compile, |index, (compiled, time)| {
        let job = &jobs[index];
        let group = &mut progress[job.group];
        group.time += time;
        group.num_done += 1;
        judge(group, job, &compiled, selection.is_verbose, &mut accepts);
        if let Ok(compiled) = compiled {
            images.push((job.unit, job.arch, job.options.clone(), compiled.cubin));
        }
        if group.num_done == sizes[job.group] {
            if group.problems.is_empty() {
                num_passed += 1
            } else {
                num_failed += 1
            }
            println!("{}", group.line(job.unit, job.arch));
        }
    });
    // In the order of the table, not of the threads: the same sources make the same archive.
    let place = |(unit, arch, options, _): &Image| (unit.name, *arch, options.clone());
    images.sort_by_key(place);
    println!("{} compilations in {:.0} s", jobs.len(), started.elapsed().as_secs_f64());
    Ok((num_passed, num_failed, images))
}

/// A compiler for each architecture: the first that is found, and for SM70 an older one, since NVRTC 13 does not know it.
fn compilers(archs: &[Arch], newest: Option<u32>) -> Result<BTreeMap<Arch, Nvrtc>, KernelError> {
    let mut compilers = BTreeMap::new();
    for &arch in archs {
        let nvrtc = Nvrtc::find(arch, newest)?;
        println!("{:8} NVRTC {}", arch.target(), nvrtc.version());
        compilers.insert(arch, nvrtc);
    }
    Ok(compilers)
}

/// Adds what came of a job to its group.
fn judge(
    group: &mut Progress,
    job: &Job<'_>,
    compiled: &Result<Compiled, KernelError>,
    is_verbose: bool,
    accepts: &mut impl FnMut(&Job<'_>, &ptxas::Usage) -> bool,
) {
    let options = job.options.join(" ");
    let compiled = match compiled {
        Ok(compiled) => compiled,
        Err(KernelError::Compile { log, .. }) => {
            let lines = log.lines().filter(|line| !line.starts_with("ptxas info")).take(MAX_LOG_LINES);
            group.problems.push(lines.fold(options, |text, line| text + "\n        " + line));
            return;
        }
        Err(error) => return group.problems.push(format!("{options}: {error}")),
    };
    let (kernels, others) = ptxas::read(&compiled.log);
    group.num_bytes += compiled.cubin.len();
    group.num_kernels += kernels.len();
    // NVRTC 12's own news of SM70.
    for line in
        others.into_iter().filter(|line| !line.contains("are deprecated and may be removed")).take(MAX_LOG_LINES)
    {
        group.notes.push(format!("{options}: {line}"));
    }
    if kernels.is_empty() {
        group.problems.push(format!("{options}: there is no kernel in it"));
    }
    for kernel in kernels {
        let ptxas::Usage { kernel: name, registers, stack_bytes, spilled_bytes } = &kernel;
        group.max_registers = group.max_registers.max(*registers);
        let line = || {
            format!(
                "{name} {options}: {registers} registers, {stack_bytes} bytes of stack, {spilled_bytes} bytes spilled"
            )
        };
        if *spilled_bytes > 0 && !accepts(job, &kernel) {
            group.problems.push(line());
        } else if is_verbose {
            group.notes.push(line());
        }
    }
}

impl Progress {
    fn line(&self, unit: &Unit, arch: Arch) -> String {
        let state = if self.problems.is_empty() { "ok" } else { "FAILED" };
        let (kernels, registers) = (self.num_kernels, self.max_registers);
        let mut line = format!(
            "{state:6} {:8} {:32} {:3} variants {kernels:4} kernels {registers:4} registers {:8} bytes {:6.1} s",
            arch.target(),
            unit.name,
            self.num_done,
            self.num_bytes,
            self.time.as_secs_f64()
        );
        for detail in self.problems.iter().chain(&self.notes) {
            let _ = write!(line, "\n      {detail}");
        }
        line
    }
}
