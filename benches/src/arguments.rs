//! Command-line options: `--name value`, and `--name` alone.

use std::fmt;
use std::process::ExitCode;
use std::str::FromStr;

/// The options that nobody has asked for yet.
#[derive(Debug, Clone)]
pub struct Arguments {
    rest: Vec<String>,
}

/// What is wrong with the options.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArgumentError(pub String);

impl fmt::Display for ArgumentError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ArgumentError {}

/// The `main` of a program: `--help` prints `usage`; wrong options do, with what is wrong, and end with status 2; an error of
/// `run` ends with status 1.
#[expect(clippy::print_stdout, reason = "help that was asked for is output")]
pub fn main<O>(
    name: &str,
    usage: &str,
    parse: impl FnOnce(Arguments) -> Result<O, ArgumentError>,
    run: impl FnOnce(O) -> Result<ExitCode, Box<dyn std::error::Error>>,
) -> ExitCode {
    let mut args = Arguments::from_process();
    if args.flag("--help") {
        print!("{usage}");
        return ExitCode::SUCCESS;
    }
    let options = match parse(args) {
        Ok(options) => options,
        Err(error) => {
            eprintln!("{name}: {error}\n\n{usage}");
            return ExitCode::from(2);
        }
    };
    run(options).unwrap_or_else(|error| {
        eprintln!("{name}: {error}");
        ExitCode::FAILURE
    })
}

impl Arguments {
    /// The options of this process.
    #[must_use]
    pub fn from_process() -> Self {
        Self::new(std::env::args_os().skip(1).map(|arg| arg.to_string_lossy().into_owned()))
    }

    /// Options from elsewhere.
    pub fn new(args: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self { rest: args.into_iter().map(Into::into).collect() }
    }

    /// Whether `name` stands there alone.
    pub fn flag(&mut self, name: &str) -> bool {
        let found = self.rest.iter().position(|arg| arg == name);
        found.map(|at| self.rest.remove(at)).is_some()
    }

    /// What stands behind `name`.
    ///
    /// # Errors
    /// [`ArgumentError`] if nothing does, or nothing of this type.
    pub fn value<T: FromStr<Err: fmt::Display>>(&mut self, name: &str) -> Result<Option<T>, ArgumentError> {
        let Some(at) = self.rest.iter().position(|arg| arg == name) else { return Ok(None) };
        if at + 1 >= self.rest.len() {
            return Err(ArgumentError(format!("{name} wants a value")));
        }
        let value = self.rest.remove(at + 1);
        self.rest.remove(at);
        value.parse().map(Some).map_err(|error| ArgumentError(format!("{name} {value}: {error}")))
    }

    /// The values behind `name`, with commas between them; none without `name`.
    ///
    /// # Errors
    /// As for [`value`](Self::value).
    pub fn list<T: FromStr<Err: fmt::Display>>(&mut self, name: &str) -> Result<Option<Vec<T>>, ArgumentError> {
        let Some(values) = self.value::<String>(name)? else { return Ok(None) };
        let parse = |value: &str| {
            value.parse().map_err(|error| ArgumentError(format!("{name} {values}: in `{value}`: {error}")))
        };
        values.split(',').map(parse).collect::<Result<_, _>>().map(Some)
    }

    /// Ends the reading.
    ///
    /// # Errors
    /// [`ArgumentError`] if something is left: an unknown option, or one that was given twice.
    pub fn finish(self) -> Result<(), ArgumentError> {
        match self.rest.first() {
            None => Ok(()),
            Some(arg) => Err(ArgumentError(format!("`{arg}` is not an option, or was given before"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_come_in_any_order() {
        let mut args = Arguments::new(["--json", "--decode", "1,8", "--threads", "2"]);
        assert_eq!(args.value("--threads"), Ok(Some(2)));
        assert_eq!(args.list("--decode"), Ok(Some(vec![1, 8])));
        assert_eq!(args.value::<usize>("--repeat"), Ok(None));
        assert!(args.flag("--json") && !args.flag("--json"));
        assert_eq!(args.finish(), Ok(()));
    }

    #[test]
    fn what_is_wrong_is_said() {
        let check = |args: &[&str], expected: &str| {
            let mut args = Arguments::new(args.iter().copied());
            let result = args.list::<usize>("--decode").and_then(|_| args.finish());
            assert_eq!(result.unwrap_err().to_string(), expected);
        };
        check(&["--decode"], "--decode wants a value");
        check(&["--decode", "1,x"], "--decode 1,x: in `x`: invalid digit found in string");
        check(&["--decode", "1", "--decode", "2"], "`--decode` is not an option, or was given before");
        check(&["--fast"], "`--fast` is not an option, or was given before");
    }
}
