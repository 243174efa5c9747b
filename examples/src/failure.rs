//! What the programs' `main` returns: an error shown with all that caused it.

use std::error::Error;
use std::fmt;

/// Any error. `main` ends with status 1 on it and shows what failed, then why, a line each.
pub struct Failure(Box<dyn Error>);

impl<E: Into<Box<dyn Error>>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

/// This is what the standard library prints when `main` returns an error.
impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut said = self.0.to_string();
        f.write_str(&said)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            let text = error.to_string();
            // Some errors quote their source.
            if !said.contains(&text) {
                write!(f, "\n  because {text}")?;
            }
            said = text;
            source = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Outer(Option<Box<Outer>>, &'static str);

    impl fmt::Display for Outer {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.1)
        }
    }

    impl Error for Outer {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            self.0.as_deref().map(|error| error as _)
        }
    }

    #[test]
    fn causes_are_shown_once_each() {
        let root = Outer(None, "no such file");
        let middle = Outer(Some(Box::new(root)), "cannot open x: no such file");
        let error = Outer(Some(Box::new(middle)), "cannot load");
        assert_eq!(format!("{:?}", Failure::from(error)), "cannot load\n  because cannot open x: no such file");
        assert_eq!(format!("{:?}", Failure::from("plain")), "plain");
    }
}
