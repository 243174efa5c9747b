//! The spilled registers that were looked at and accepted: `dashinfer-kernels/cuda/spills.txt`.
//!
//! ```text
//! # a comment
//! attention.cu | -DDASH_TYPE=bf16 -DHEAD_DIM=256 | sm_75 | 64 | outside the loops
//! ```
//!
//! The file, the options of the compilation (`*` for any), the architecture (`*` for any), the most bytes of one kernel, why.

/// A line of the list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Allowed {
    unit: String,
    /// Sorted; `None` for any.
    options: Option<Vec<String>>,
    arch: Option<String>,
    bytes: u32,
    pub(crate) line: usize,
}

/// Reads the list.
pub(crate) fn parse(text: &str) -> Result<Vec<Allowed>, String> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty() && !line.starts_with('#'));
    let read = |(index, line): (usize, &str)| {
        let parts: Vec<&str> = line.split('|').map(str::trim).collect();
        let wrong = |what: &str| format!("line {} of spills.txt: {what}", index + 1);
        let [unit, options, arch, bytes, reason] = parts[..] else {
            return Err(wrong("should be: file | options | architecture | bytes | reason"));
        };
        if reason.is_empty() {
            return Err(wrong("there is no reason"));
        }
        let bytes = bytes.parse().map_err(|_| wrong("the bytes are no number"))?;
        let known = |text: &str| (text != "*").then(|| text.to_string());
        let options = known(options).map(|options| sorted(options.split_whitespace()));
        Ok(Allowed { unit: unit.to_string(), options, arch: known(arch), bytes, line: index + 1 })
    };
    lines.map(read).collect()
}

impl Allowed {
    /// Whether the line is about this compilation.
    pub(crate) fn is_about<S: AsRef<str>>(&self, unit: &str, options: &[S], arch: &str) -> bool {
        self.unit == unit
            && self.arch.as_ref().is_none_or(|known| known == arch)
            && self.options.as_ref().is_none_or(|known| *known == sorted(options.iter().map(AsRef::as_ref)))
    }

    /// Whether it allows so many bytes.
    pub(crate) fn allows(&self, bytes: u32) -> bool {
        bytes <= self.bytes
    }
}

fn sorted<'a>(words: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut words: Vec<String> = words.map(str::to_string).collect();
    words.sort();
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_about_one_compilation_or_any() {
        let list =
            parse("# head\n\na.cu | -DB=2 -DA=1 | sm_75 | 64 | outside the loops\nb.cu | * | * | 8 | why\n").unwrap();
        assert!(list[0].is_about("a.cu", &["-DA=1", "-DB=2"], "sm_75"));
        assert!(
            !list[0].is_about("a.cu", &["-DA=1"], "sm_75") && !list[0].is_about("a.cu", &["-DA=1", "-DB=2"], "sm_80")
        );
        assert!(list[0].allows(64) && !list[0].allows(65));
        assert!(list[1].is_about("b.cu", &["-DA=1"], "sm_90a") && !list[1].is_about("a.cu", &[""], "sm_90a"));
        assert_eq!(list[1].line, 4);
        for wrong in ["a.cu | * | * | 8", "a.cu | * | * | many | why", "a.cu | * | * | 8 | "] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_list_of_the_tree_can_be_read() {
        let path = crate::workspace().join(crate::kernels::SPILLS);
        assert!(parse(&std::fs::read_to_string(path).unwrap()).is_ok());
    }
}
