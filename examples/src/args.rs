//! Command lines, as far as these programs need them: words, and options with a value each.

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// What is left of a command line. Options are taken out by name, in any order; what remains are words.
#[derive(Debug)]
pub struct Args {
    left: Vec<OsString>,
}

/// What is wrong with a command line.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ArgError {
    /// An option stands at the end.
    NoValue {
        /// Its name.
        option: String,
    },
    /// A value that its option does not take.
    Value {
        /// The option's name.
        option: String,
        /// What it was given.
        found: String,
        /// What is wrong with that.
        why: String,
    },
    /// Something that the program does not know, or too much of what it does.
    Unknown {
        /// It.
        found: String,
    },
    /// A word is missing.
    Missing {
        /// What it stands for.
        what: &'static str,
    },
}

impl fmt::Display for ArgError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoValue { option } => write!(f, "{option} wants a value")?,
            Self::Value { option, found, why } => write!(f, "{option} {found}: {why}")?,
            Self::Unknown { found } => write!(f, "`{found}` was not expected")?,
            Self::Missing { what } => write!(f, "{what} is missing")?,
        }
        f.write_str(" (--help says what there is)")
    }
}

impl std::error::Error for ArgError {}

impl Args {
    /// The command line of this process. With `--help` in it, shows `usage` and ends the process.
    #[must_use]
    #[allow(clippy::print_stdout, reason = "the answer to --help is output")]
    pub fn from_env(usage: &str) -> Self {
        let args = Self::new(std::env::args_os().skip(1));
        let own = args.left.iter().take_while(|arg| *arg != "--");
        if own.into_iter().any(|arg| arg == "--help" || arg == "-h") {
            println!("{usage}");
            std::process::exit(0);
        }
        args
    }

    /// A command line without the program's name.
    pub fn new<S: Into<OsString>>(args: impl IntoIterator<Item = S>) -> Self {
        Self { left: args.into_iter().map(Into::into).collect() }
    }

    /// The value of `option`, written `--option VALUE` or `--option=VALUE`; the last one if there are several.
    ///
    /// # Errors
    /// [`ArgError::NoValue`], [`ArgError::Value`].
    pub fn option<T: FromStr<Err: fmt::Display>>(&mut self, option: &str) -> Result<Option<T>, ArgError> {
        let Some(value) = self.take(option)? else { return Ok(None) };
        let wrong = |found: String, why: String| ArgError::Value { option: option.to_owned(), found, why };
        let text = value.into_string().map_err(|v| wrong(v.to_string_lossy().into_owned(), "not UTF-8".to_owned()))?;
        text.parse().map(Some).map_err(|error: T::Err| wrong(text, error.to_string()))
    }

    /// The value of `option`, which may be any path.
    ///
    /// # Errors
    /// [`ArgError::NoValue`].
    pub fn path(&mut self, option: &str) -> Result<Option<PathBuf>, ArgError> {
        Ok(self.take(option)?.map(PathBuf::from))
    }

    /// The next word, to be called when all options were taken.
    ///
    /// # Errors
    /// [`ArgError::Missing`] without one, [`ArgError::Unknown`] if an option stands in its place.
    pub fn word(&mut self, what: &'static str) -> Result<OsString, ArgError> {
        self.refuse_options()?;
        if self.left.is_empty() { Err(ArgError::Missing { what }) } else { Ok(self.left.remove(0)) }
    }

    /// All remaining words as one text; `None` without any.
    ///
    /// # Errors
    /// [`ArgError::Unknown`] if an option is among them.
    pub fn text(mut self) -> Result<Option<String>, ArgError> {
        self.refuse_options()?;
        let words: Vec<_> = self.left.iter().map(|word| word.to_string_lossy()).collect();
        Ok((!words.is_empty()).then(|| words.join(" ")))
    }

    /// Ends the reading.
    ///
    /// # Errors
    /// [`ArgError::Unknown`] if something is left.
    pub fn end(mut self) -> Result<(), ArgError> {
        self.refuse_options()?;
        match self.left.first() {
            Some(found) => Err(ArgError::Unknown { found: found.to_string_lossy().into_owned() }),
            None => Ok(()),
        }
    }

    fn take(&mut self, option: &str) -> Result<Option<OsString>, ArgError> {
        let mut value = None;
        let mut i = 0;
        // Behind a `--` there are words only.
        while i < self.left.len() && self.left[i] != "--" {
            if self.left[i] == option {
                self.left.remove(i);
                if i == self.left.len() || self.left[i] == "--" {
                    return Err(ArgError::NoValue { option: option.to_owned() });
                }
                value = Some(self.left.remove(i));
            } else if let Some(inline) =
                self.left[i].to_str().and_then(|arg| arg.strip_prefix(option)).and_then(|rest| rest.strip_prefix('='))
            {
                value = Some(inline.into());
                self.left.remove(i);
            } else {
                i += 1;
            }
        }
        Ok(value)
    }

    fn refuse_options(&mut self) -> Result<(), ArgError> {
        for i in 0..self.left.len() {
            if self.left[i] == "--" {
                self.left.remove(i);
                break;
            }
            if self.left[i].to_string_lossy().starts_with("--") {
                return Err(ArgError::Unknown { found: self.left[i].to_string_lossy().into_owned() });
            }
        }
        Ok(())
    }
}

/// A size in memory, written as bytes or with one of `K`, `M`, `G` (binary) behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bytes(
    /// Bytes.
    pub u64,
);

impl FromStr for Bytes {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let units = [("K", 1 << 10), ("M", 1 << 20), ("G", 1 << 30)];
        let with_unit = units.iter().find_map(|(name, unit)| Some((text.strip_suffix(name)?, *unit)));
        let (number, unit) = with_unit.unwrap_or((text, 1));
        let bytes = number.parse::<u64>().ok().and_then(|number| number.checked_mul(unit));
        bytes.map(Self).ok_or("wanted a number of bytes, such as 500M or 2G")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_taken_from_anywhere_and_words_remain() {
        let mut args = Args::new(["once", "--max-tokens", "5", "upon", "--model=a b", "--max-tokens=6"]);
        assert_eq!(args.option("--max-tokens"), Ok(Some(6_usize)));
        assert_eq!(args.path("--model"), Ok(Some(PathBuf::from("a b"))));
        assert_eq!(args.option::<usize>("--threads"), Ok(None));
        assert_eq!(args.text(), Ok(Some("once upon".to_owned())));
        assert_eq!(Args::new([""; 0]).text(), Ok(None));
    }

    #[test]
    fn behind_two_dashes_all_are_words() {
        let mut args = Args::new(["--", "--model", "x"]);
        assert_eq!(args.path("--model"), Ok(None));
        assert_eq!(args.text(), Ok(Some("--model x".to_owned())));
    }

    #[test]
    fn what_is_wrong_is_said() {
        fn text<T: fmt::Debug>(result: Result<T, ArgError>) -> String {
            result.unwrap_err().to_string().replace(" (--help says what there is)", "")
        }
        assert_eq!(text(Args::new(["--threads"]).option::<usize>("--threads")), "--threads wants a value");
        let two = text(Args::new(["--threads", "two"]).option::<usize>("--threads"));
        assert_eq!(two, "--threads two: invalid digit found in string");
        assert_eq!(text(Args::new(["--thread", "2"]).text()), "`--thread` was not expected");
        assert_eq!(text(Args::new(["more"]).end()), "`more` was not expected");
        assert_eq!(text(Args::new([""; 0]).word("MODEL")), "MODEL is missing");
        let size = text(Args::new(["--limit", "5T"]).option::<Bytes>("--limit"));
        assert_eq!(size, "--limit 5T: wanted a number of bytes, such as 500M or 2G");
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!("12".parse(), Ok(Bytes(12)));
        assert_eq!("2G".parse(), Ok(Bytes(2 << 30)));
        assert!("99999999999G".parse::<Bytes>().is_err());
        assert!("-1".parse::<Bytes>().is_err());
    }
}
