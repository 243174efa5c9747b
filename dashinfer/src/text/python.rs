//! What chat templates expect of Python and of `transformers`, beyond Jinja itself.

use std::error::Error as _;
use std::fmt;
use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State};
use serde::Serialize;
use serde_json::ser::Formatter;

/// Adds the functions, filters and methods.
pub(super) fn add_to(environment: &mut Environment<'static>) {
    environment.set_unknown_method_callback(method);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", |format: &str| strftime(format, SystemTime::now()));
    environment.add_filter("tojson", tojson);
    // What has a length and can be indexed, which in Python strings and dicts have and can.
    environment.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map)
    });
}

/// Python's methods. What they read and make is paid for first, as the engine looks at results alone.
fn method(state: &mut State, value: &Value, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    let refused = |message: &str| Err(Error::new(ErrorKind::InvalidOperation, message.to_owned()));
    let bytes = |value: &Value| value.as_str().map_or(0, str::len) as u64;
    let given: u64 = arguments.iter().map(bytes).sum();
    let mut cost = bytes(value) + given;
    match (value.kind(), method) {
        (ValueKind::String, "replace") => {
            let places = match arguments {
                [old, ..] if bytes(old) > 0 => bytes(value) / bytes(old),
                _ => bytes(value),
            };
            cost = cost.saturating_add((places + 1).saturating_mul(given));
        }
        (ValueKind::String, "join") => {
            // Written by the engine, which pays for all that it writes.
            let [values] = arguments else { return refused("join wants one list") };
            let separator = Value::from(value.as_str().unwrap_or_default());
            return state.apply_filter("join", &[values.clone(), separator]);
        }
        (ValueKind::String, "format") => {
            let format = value.as_str().unwrap_or_default();
            // Widths and precisions, and they are not what is given: `{:{}}`.
            let numbers = format.split(|char: char| !char.is_ascii_digit());
            cost = cost
                .saturating_add(numbers.filter_map(|number| number.parse::<u64>().ok()).fold(0, u64::saturating_add));
            if format.split('}').any(|field| field.split_once(':').is_some_and(|(_, form)| form.contains('{'))) {
                return refused("format takes no fields within fields here");
            }
            if arguments.iter().any(|argument| argument.as_object().is_some()) {
                return refused("format takes no lists and objects here");
            }
        }
        (ValueKind::Seq, "count") => {
            if arguments.iter().any(|what| what.as_object().is_some()) {
                return refused("count looks for plain values here");
            }
            cost = (value.len().unwrap_or(0) as u64).saturating_mul(64 + given);
        }
        (_, "startswith" | "endswith") => {
            cost += 64 * arguments.first().and_then(Value::len).unwrap_or(0) as u64;
        }
        _ => {}
    }
    state.consume_fuel(cost / 64)?;
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, arguments)
}

/// What a template raised.
#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, "the template raised an exception").with_source(Raised(message)))
}

/// The message, if `error` comes from `raise_exception`.
pub(super) fn raised(error: &Error) -> Option<&str> {
    let mut source = error.source();
    while let Some(error) = source {
        if let Some(Raised(message)) = error.downcast_ref() {
            return Some(message);
        }
        source = error.source();
    }
    None
}

/// `json.dumps(value, ensure_ascii=False, indent=indent, separators=separators)`: Jinja's own filter would escape for HTML.
fn tojson(state: &State, value: &Value, kwargs: Kwargs) -> Result<String, Error> {
    // Deeper than anyone reads: it bounds what a template can ask for.
    const MAX_INDENT: usize = 64;
    for name in ["ensure_ascii", "sort_keys"] {
        if kwargs.get::<Option<bool>>(name)? == Some(true) {
            let message = format!("tojson has no {name} here, wanted false or nothing");
            return Err(Error::new(ErrorKind::InvalidOperation, message));
        }
    }
    let indent: Option<usize> = kwargs.get("indent")?;
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    kwargs.assert_all_used()?;
    let (item, key) = match separators.as_deref() {
        None if indent.is_some() => (",", ": "),
        None => (", ", ": "),
        Some([item, key]) => (item.as_str(), key.as_str()),
        Some(found) => {
            let message = format!("tojson has {} separators, wanted 2", found.len());
            return Err(Error::new(ErrorKind::InvalidOperation, message));
        }
    };
    let indent = indent.map(|indent| " ".repeat(indent.min(MAX_INDENT)));
    let mut json = Paid { state, bytes: Vec::new() };
    let formatter = Separated { item, key, indent: indent.as_deref(), depth: 0, is_empty: true };
    let failed = |message: String| Error::new(ErrorKind::BadSerialization, message);
    value
        .serialize(&mut serde_json::Serializer::with_formatter(&mut json, formatter))
        .map_err(|error| failed(error.to_string()))?;
    String::from_utf8(json.bytes).map_err(|error| failed(error.to_string()))
}

/// JSON as it is written: with every byte, fuel is taken for it, so that a value that repeats itself ends.
struct Paid<'a, 'b, 'c> {
    state: &'a State<'b, 'c>,
    bytes: Vec<u8>,
}

impl io::Write for Paid<'_, '_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        const BYTES_PER_FUEL: usize = 4;
        let units = |bytes: usize| (bytes / BYTES_PER_FUEL) as u64;
        let before = self.bytes.len();
        self.state.consume_fuel(units(before + bytes.len()) - units(before)).map_err(io::Error::other)?;
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Python's layout: the separators are the caller's, and with an indent each item has a line.
struct Separated<'a> {
    item: &'a str,
    key: &'a str,
    indent: Option<&'a str>,
    depth: usize,
    /// Whether the innermost array or object has no item yet: `[]` stays on its line.
    is_empty: bool,
}

impl Separated<'_> {
    fn new_line<W: ?Sized + io::Write>(&self, writer: &mut W) -> io::Result<()> {
        let Some(indent) = self.indent else { return Ok(()) };
        writer.write_all(b"\n")?;
        (0..self.depth).try_for_each(|_| writer.write_all(indent.as_bytes()))
    }

    fn begin<W: ?Sized + io::Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        (self.depth, self.is_empty) = (self.depth + 1, true);
        writer.write_all(bracket)
    }

    fn begin_item<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if !first {
            writer.write_all(self.item.as_bytes())?;
        }
        self.is_empty = false;
        self.new_line(writer)
    }

    fn end<W: ?Sized + io::Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if !self.is_empty {
            self.new_line(writer)?;
        }
        self.is_empty = false;
        writer.write_all(bracket)
    }
}

impl Formatter for Separated<'_> {
    fn begin_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.begin(writer, b"[")
    }

    fn end_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.end(writer, b"]")
    }

    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.begin_item(writer, first)
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.begin(writer, b"{")
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.end(writer, b"}")
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.begin_item(writer, first)
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(self.key.as_bytes())
    }
}

/// Turns `{% generation %}` and its end, by which `transformers` marks what a model wrote, into blocks that do nothing.
pub(super) fn without_generation_blocks(template: &str) -> String {
    let mut out = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        // Behind `{%`: the tag `{%}` has not ended.
        let Some(end) = tag[2..].find("%}").map(|end| end + 2) else {
            rest = tag;
            break;
        };
        let inside = &tag[2..end];
        match inside.trim_matches(|char: char| char.is_whitespace() || char == '-' || char == '+') {
            "generation" => out.extend(["{%", &inside.replacen("generation", "if true", 1), "%}"]),
            "endgeneration" => out.extend(["{%", &inside.replacen("endgeneration", "endif", 1), "%}"]),
            _ => {
                // Go on right behind `{%`: this may be a string that only looks like a tag.
                out.push_str("{%");
                rest = &tag[2..];
                continue;
            }
        }
        rest = &tag[end + 2..];
    }
    out.push_str(rest);
    out
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// Python's `strftime`, in UTC, for the directives that date and time are written with.
fn strftime(format: &str, time: SystemTime) -> Result<String, Error> {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, second_of_day) = (seconds / 86_400, seconds % 86_400);
    let (hour, minute, second) = (second_of_day / 3600, second_of_day / 60 % 60, second_of_day % 60);
    let (year, month, day) = civil(days);
    let month_name = MONTHS[month as usize - 1];
    let weekday = ((days + 4) % 7) as usize; // 1 January 1970 was a Thursday
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(char) = chars.next() {
        if char != '%' {
            out.push(char);
            continue;
        }
        out += &match chars.next() {
            Some('Y') => year.to_string(),
            Some('y') => format!("{:02}", year % 100),
            Some('m') => format!("{month:02}"),
            Some('B') => month_name.to_owned(),
            Some('b' | 'h') => month_name[..3].to_owned(),
            Some('d') => format!("{day:02}"),
            Some('e') => format!("{day:2}"),
            Some('A') => WEEKDAYS[weekday].to_owned(),
            Some('a') => WEEKDAYS[weekday][..3].to_owned(),
            Some('w') => weekday.to_string(),
            Some('H') => format!("{hour:02}"),
            Some('I') => format!("{:02}", (hour + 11) % 12 + 1),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('M') => format!("{minute:02}"),
            Some('S') => format!("{second:02}"),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('Z') => "UTC".to_owned(),
            Some('z') => "+0000".to_owned(),
            Some('%') => "%".to_owned(),
            other => {
                let found = other.map_or("nothing".to_owned(), |char| format!("`{char}`"));
                let message = format!("strftime_now knows YymBbhdeAawHIpMSFTZz% after a `%`, found {found}");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        };
    }
    Ok(out)
}

/// Year, month and day of a number of days since 1 January 1970.
/// <https://howardhinnant.github.io/date_algorithms.html#civil_from_days>
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468; // since 1 March of year 0
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153; // months since March
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn at(seconds: u64, format: &str) -> Result<String, String> {
        strftime(format, UNIX_EPOCH + Duration::from_secs(seconds)).map_err(|error| error.to_string())
    }

    #[test]
    fn dates_are_written_as_python_writes_them() {
        assert_eq!(at(0, "%A %d %B %Y, %H:%M:%S").unwrap(), "Thursday 01 January 1970, 00:00:00");
        assert_eq!(at(951_827_696, "%a %e %b %y %I:%M %p 100%%").unwrap(), "Tue 29 Feb 00 12:34 PM 100%");
        assert_eq!(at(1_735_689_599, "%F %T").unwrap(), "2024-12-31 23:59:59");
        assert_eq!(at(4_107_542_400, "%F").unwrap(), "2100-03-01");
        assert!(at(0, "%Q").unwrap_err().contains("found `Q`"));
        assert!(at(0, "100%").unwrap_err().contains("found nothing"));
    }

    #[test]
    fn only_tags_of_generation_are_replaced() {
        let check = |template, want: &str| assert_eq!(without_generation_blocks(template), want);
        check("a{%- generation -%}b{% endgeneration %}c", "a{%- if true -%}b{% endif %}c");
        check(
            "{% if add_generation_prompt %}{{ '{%' }}{% endif %}",
            "{% if add_generation_prompt %}{{ '{%' }}{% endif %}",
        );
        check("{{ '{%' }}{% generation %}", "{{ '{%' }}{% if true %}");
        check("{% generation", "{% generation");
        check("{%}a{% generation %}", "{%}a{% if true %}");
        check("{%}", "{%}");
    }
}
