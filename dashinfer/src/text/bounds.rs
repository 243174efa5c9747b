//! What keeps a chat template, which comes with a checkpoint, within bounded time, memory and stack.
//!
//! Fuel bounds what a template does, and how long the texts and lists are that it makes. It does not bound values that nest: a list in a
//! list in a list ends in a stack overflow when it is dropped, and `x = [x, x]` some fifty times takes ages to print or compare, as what is
//! shared is visited each time. So all that makes a value of others goes through [`bounded`]: literals and assignments by
//! [`guarded`], which writes calls around them into the source, functions and filters by being replaced ([`add_to`]). Expressions that are
//! very long nest in the compiler, whose stack they would overflow; they are refused.

use minijinja::value::{Kwargs, ObjectRepr, Rest, Value};
use minijinja::{Environment, Error, ErrorKind, State, filters, functions};

/// The deepest that values nest, schemas of tools among them.
const MAX_DEPTH: usize = 64;
/// The most values in a value, each counted as often as it occurs: those of a chat of 40,000 messages.
const MAX_VALUES: u64 = 200_000;
/// The most tokens of an expression or a tag; at 4000 an unoptimized build overflows 2 MiB.
const MAX_TOKENS: usize = 1000;
/// The most branches of all conditions; each nests in the one before.
const MAX_BRANCHES: usize = 250;

/// The names of the calls in the source.
const BOUNDED: &str = "__bounded";
const FIELD: &str = "__field";

/// Names that variables of a template must not have.
pub(super) const RESERVED: [&str; 2] = [BOUNDED, FIELD];

/// Fuel for the rendering of `num_messages` messages with texts of `num_bytes` bytes: far more than templates have use for. A unit is an
/// instruction, or 64 bytes of a value.
pub(super) fn fuel(num_messages: usize, num_bytes: usize) -> u64 {
    1_000_000 + 20_000 * num_messages as u64 + 16 * num_bytes as u64
}

/// Adds what [`guarded`] calls, and puts bounds on what makes values of others.
pub(super) fn add_to(environment: &mut Environment<'static>) {
    environment.add_function(BOUNDED, |state: &State, value: Value| bounded(state, value));
    environment.add_function(FIELD, |state: &State, value: Value| {
        let mut left = MAX_VALUES;
        visit(&value, MAX_DEPTH, &mut left, true)?;
        state.consume_fuel(MAX_VALUES - left)?;
        Ok::<_, Error>(value)
    });
    for (name, function) in
        [("dict", Value::from_function(functions::dict)), ("namespace", Value::from_function(functions::namespace))]
    {
        environment.add_function(name, move |state: &mut State, arguments: Rest<Value>, named: Kwargs| {
            call(&function, state, arguments, named)
        });
    }
    for (name, filter) in [
        ("batch", Value::from_function(filters::batch)),
        ("dictsort", Value::from_function(filters::dictsort)),
        ("groupby", Value::from_function(filters::groupby)),
        ("items", Value::from_function(filters::items)),
        ("slice", Value::from_function(filters::slice)),
    ] {
        environment.add_filter(name, move |state: &mut State, arguments: Rest<Value>, named: Kwargs| {
            call(&filter, state, arguments, named)
        });
    }
    // Not of Jinja.
    environment.remove_filter("zip");
    environment.remove_filter("chain");
}

/// What a function gives, if it is [`bounded`].
fn call(function: &Value, state: &mut State, arguments: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    let mut arguments = arguments.0;
    if named.args().next().is_some() {
        arguments.push(named.into());
    }
    let value = function.call(state, &arguments)?;
    bounded(state, value)
}

fn too_large(what: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, what)
}

/// The value, if it has few values in it and they do not nest deeply.
fn bounded(state: &State, value: Value) -> Result<Value, Error> {
    let mut left = MAX_VALUES;
    visit(&value, MAX_DEPTH, &mut left, false)?;
    state.consume_fuel(MAX_VALUES - left)?;
    Ok(value)
}

/// Counts the values in `value` down. A `field` of a namespace has none of them: it could have itself, and that without end.
fn visit(value: &Value, depth: usize, left: &mut u64, field: bool) -> Result<(), Error> {
    let Some(object) = value.as_object() else { return Ok(()) };
    if field && object.type_name().ends_with("::Namespace") {
        return Err(too_large("a namespace cannot be kept in a namespace".to_owned()));
    }
    let repr = object.repr();
    if !matches!(repr, ObjectRepr::Seq | ObjectRepr::Iterable | ObjectRepr::Map) {
        return Ok(());
    }
    let Some(depth) = depth.checked_sub(1) else {
        return Err(too_large(format!("a value nests deeper than {MAX_DEPTH}")));
    };
    let mut visit_next = |value: &Value| {
        *left = left.checked_sub(1).ok_or_else(|| too_large(format!("a value has more than {MAX_VALUES} in it")))?;
        visit(value, depth, left, field)
    };
    if repr == ObjectRepr::Map {
        for (key, value) in object.try_iter_pairs().into_iter().flatten() {
            visit_next(&key)?;
            visit_next(&value)?;
        }
    } else {
        for value in object.try_iter().into_iter().flatten() {
            visit_next(&value)?;
        }
    }
    Ok(())
}

/// The source with calls around literals of lists, maps and tuples, and around what is assigned; or why it has no bounds.
///
/// It splits the source as the template engine does. Where that finds an error, what this makes of the rest is of no interest.
pub(super) fn guarded(source: &str) -> Result<String, Error> {
    let mut out = String::with_capacity(source.len() + source.len() / 8);
    let mut rest = source;
    let mut branches = 0;
    while let Some(start) = rest.find('{') {
        let (text, tag) = rest.split_at(start);
        out.push_str(text);
        rest = match tag.as_bytes().get(1) {
            Some(b'#') => {
                let end = tag[2..].find("#}").map_or(tag.len(), |end| end + 4);
                copy(&mut out, tag, end)
            }
            Some(b'%') if tag_name(tag) == "raw" => {
                let end = tag.match_indices("{%").skip(1).find(|(at, _)| tag_name(&tag[*at..]) == "endraw");
                copy(&mut out, tag, end.map_or(tag.len(), |(at, _)| at + 2))
            }
            Some(b'%') => {
                branches += usize::from(tag_name(tag) == "elif");
                if branches > MAX_BRANCHES {
                    return Err(Error::new(ErrorKind::SyntaxError, format!("more than {MAX_BRANCHES} branches")));
                }
                Tag::new(&tag[2..], "%}", &mut out).write()?
            }
            Some(b'{') => Tag::new(&tag[2..], "}}", &mut out).write()?,
            _ => copy(&mut out, tag, 1),
        };
    }
    out.push_str(rest);
    Ok(out)
}

/// Copies up to `end`, and gives what is behind it.
fn copy<'a>(out: &mut String, text: &'a str, end: usize) -> &'a str {
    out.push_str(&text[..end]);
    &text[end..]
}

/// The first word of a tag that starts with `{%`.
fn tag_name(tag: &str) -> &str {
    let inside = tag[2..]
        .strip_prefix(['-', '+'])
        .unwrap_or(&tag[2..])
        .trim_start_matches(|char: char| char.is_ascii_whitespace());
    &inside[..inside.find(|char: char| !is_word(char)).unwrap_or(inside.len())]
}

fn is_word(char: char) -> bool {
    char.is_alphanumeric() || char == '_'
}

/// Words that an operand follows. Others end one, so that a bracket behind them is an index or a call.
const BEFORE_OPERANDS: [&str; 15] = [
    "and",
    "or",
    "not",
    "in",
    "if",
    "else",
    "elif",
    "do",
    "for",
    "set",
    "with",
    "include",
    "extends",
    "autoescape",
    "import",
];

/// What is between `{{` and `}}`, or `{%` and `%}`.
struct Tag<'a, 'o> {
    rest: &'a str,
    end: &'static str,
    out: &'o mut String,
    /// Brackets that are open, and whether a call is around each.
    open: Vec<bool>,
    /// Whether what was read last ends an operand.
    after_operand: bool,
    /// Whether names are bound here, and brackets group them: between `set` and `=`, `for` and `in`.
    binding: Binding,
    /// Calls to be closed behind all.
    assigned: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Binding {
    None,
    Set { field: bool },
    For,
}

impl<'a, 'o> Tag<'a, 'o> {
    /// `rest` is what follows the first two characters.
    fn new(rest: &'a str, end: &'static str, out: &'o mut String) -> Self {
        out.push_str(if end == "%}" { "{%" } else { "{{" });
        let mut tag =
            Self { rest, end, out, open: Vec::new(), after_operand: false, binding: Binding::None, assigned: false };
        if tag.rest.starts_with(['-', '+']) {
            tag.take(1);
        }
        tag
    }

    fn take(&mut self, bytes: usize) {
        self.rest = copy(self.out, self.rest, bytes);
    }

    /// Writes all of it, and gives what follows.
    fn write(mut self) -> Result<&'a str, Error> {
        let (mut tokens, mut word, mut word_before) = (0, "", "");
        while let Some(char) = self.rest.chars().next() {
            if char.is_ascii_whitespace() {
                self.take(1);
                continue;
            }
            if self.open.is_empty() {
                let trimmed = usize::from(matches!(char, '-' | '+'));
                if self.rest[trimmed..].starts_with(self.end) {
                    if self.assigned {
                        self.out.push_str("))");
                    }
                    self.take(trimmed + 2);
                    return Ok(self.rest);
                }
            }
            tokens += 1;
            if tokens > MAX_TOKENS {
                let message = format!("an expression or a tag of more than {MAX_TOKENS} tokens");
                return Err(Error::new(ErrorKind::SyntaxError, message));
            }
            if is_word(char) {
                let len = self.rest.find(|char: char| !is_word(char)).unwrap_or(self.rest.len());
                (word_before, word) = (word, &self.rest[..len]);
                self.word(word, word_before, tokens == 1)?;
                self.take(len);
                continue;
            }
            match char {
                '\'' | '"' => {
                    let mut escaped = false;
                    let end = self.rest.char_indices().skip(1).find(|&(_, other)| {
                        let ends = other == char && !escaped;
                        escaped = other == '\\' && !escaped;
                        ends
                    });
                    self.take(end.map_or(self.rest.len(), |(at, _)| at + 1));
                    self.after_operand = true;
                }
                '[' | '{' | '(' => {
                    // What a test compares with has no place for a call, and is not kept.
                    let tested = word_before == "is" || (word == "in" && word_before == "not");
                    let literal = !self.after_operand && self.binding == Binding::None && !tested;
                    if literal {
                        self.out.push_str(BOUNDED);
                        self.out.push('(');
                    }
                    self.open.push(literal);
                    self.take(1);
                    self.after_operand = false;
                }
                ']' | '}' | ')' => {
                    self.take(1);
                    match self.open.pop() {
                        Some(true) => self.out.push(')'),
                        Some(false) => {}
                        None => return Err(Error::new(ErrorKind::SyntaxError, "a bracket that was not opened")),
                    }
                    self.after_operand = true;
                }
                '=' if self.open.is_empty()
                    && !self.rest.starts_with("==")
                    && matches!(self.binding, Binding::Set { .. }) =>
                {
                    self.take(1);
                    self.out.push_str(if self.binding == (Binding::Set { field: true }) { FIELD } else { BOUNDED });
                    self.out.push_str("((");
                    (self.binding, self.assigned, self.after_operand) = (Binding::None, true, false);
                }
                other => {
                    if let (Binding::Set { field }, '.') = (&mut self.binding, other) {
                        *field = true;
                    }
                    self.take(other.len_utf8());
                    self.after_operand = false;
                }
            }
            (word, word_before) = ("", "");
        }
        Ok(self.rest)
    }

    fn word(&mut self, word: &str, before: &str, first: bool) -> Result<(), Error> {
        if RESERVED.contains(&word) {
            return Err(Error::new(ErrorKind::SyntaxError, format!("{word} is no name for templates")));
        }
        self.after_operand = !BEFORE_OPERANDS.contains(&word) || before == "is";
        match word {
            "set" if first && self.end == "%}" => self.binding = Binding::Set { field: false },
            "for" if first && self.end == "%}" => self.binding = Binding::For,
            "in" if self.binding == Binding::For => self.binding = Binding::None,
            _ => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{ChatOptions, ChatTemplate, Message, TemplateError};

    #[test]
    fn calls_are_around_literals_and_assignments() {
        let check = |source: &str, want: &str| {
            let want = want.replace("b(", "__bounded(").replace("f(", "__field(");
            assert_eq!(guarded(source).unwrap(), want, "{source}");
            assert_eq!(guarded(&format!("a{source}é\n")).unwrap(), format!("a{want}é\n"));
        };
        check("{{ [1, 2] }}", "{{ b([1, 2]) }}");
        check("{{- x[0]['a'](1)[::-1] -}}", "{{- x[0]['a'](1)[::-1] -}}");
        check("{{ {'}}': {}} }}", "{{ b({'}}': b({})}) }}");
        check("{{ 1 + (2, x) }}", "{{ 1 + b((2, x)) }}");
        check("{% set x = [] %}", "{% set x =b(( b([]) ))%}");
        check("{% set n.x = y -%}", "{% set n.x =f(( y ))-%}");
        check("{% set (a, b) = x == y %}", "{% set (a, b) =b(( x == y ))%}");
        check("{% set x %}=[]{% endset %}", "{% set x %}=[]{% endset %}");
        check("{% for (a, b) in [c] if d not in (1, 2) %}", "{% for (a, b) in b([c]) if d not in (1, 2) %}");
        check("{% macro m(a=[]) %}{{ 'x\\'[' ~ \"[\" }}", "{% macro m(a=b([])) %}{{ 'x\\'[' ~ \"[\" }}");
        check("{% raw %}{{ [] }}{% endraw %}{# {{ [] }} #}{[]}", "{% raw %}{{ [] }}{% endraw %}{# {{ [] }} #}{[]}");
        check("{#}{{ [] }}#}{{ [] }}", "{#}{{ [] }}#}{{ b([]) }}");
        check("{% if x is in [1] and [x] %}", "{% if x is in [1] and b([x]) %}");
        check("{{ x is not in [1] }}{{ x not in [1] }}", "{{ x is not in [1] }}{{ x not in [1] }}");
    }

    fn render(source: &str) -> Result<String, TemplateError> {
        let (source, messages) = (source.to_owned(), [Message::user("hi")]);
        // The stack of an ordinary thread, which test runners may have changed.
        let thread = std::thread::Builder::new()
            .stack_size(2 << 20)
            .spawn(move || ChatTemplate::new(source, BTreeMap::new())?.render(&messages, &ChatOptions::default()));
        thread.unwrap().join().unwrap()
    }

    /// What a template ends with: its own words, and why.
    #[track_caller]
    fn check_error(source: &str, want: &str) {
        let error = render(source).unwrap_err();
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert!(cause.contains(want), "{}: {cause}", source.chars().take(200).collect::<String>());
    }

    #[test]
    fn a_template_that_loops_runs_out_of_fuel() {
        let many = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
        for source in [
            many,
            "{% set n = namespace(x='a') %}{% for _ in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "{{ 'a' * 99999999 }}",
            "{{ ('a' * 9999).replace('a', 'a' * 9999).replace('a', 'a' * 9999) }}",
            "{{ '{:99999999999}'.format(1) }}",
            "{{ ('a' * 999999).join(range(9999) | list) }}",
            "{% set x = 'a' * 9999999 %}{% for _ in range(9999) %}{{ x.find('b') }}{% endfor %}",
            "{% set x = [messages] * 9 %}{% for _ in range(9999) %}{% for _ in range(9) %}{{ x | tojson }}{% endfor %}{% endfor %}",
        ] {
            check_error(source, "ran out of fuel");
        }
        check_error("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion limit");
    }

    #[test]
    fn values_do_not_nest_without_end() {
        let repeated =
            |body: &str| format!("{{% set n = namespace(x=1) %}}{{% for a in range(9999) %}}{body}{{% endfor %}}");
        for value in
            ["[n.x]", "{'a': n.x}", "(n.x,)", "dict(a=n.x)", "[n.x] | batch(1) | list", "{'a': n.x} | items | list"]
        {
            check_error(&repeated(&format!("{{% set n.x = {value} %}}")), "nests deeper than 64");
        }
        for value in ["[n.x, n.x]", "{1: n.x, 2: n.x}", "[n.x, n.x] | list", "[[n.x]] * 2"] {
            check_error(&repeated(&format!("{{% set n.x = {value} %}}")), "more than 200000 in it");
        }
        let doubled = "{% set x = [x, x] %}".repeat(60);
        check_error(&format!("{doubled}{{{{ x }}}}"), "more than 200000 in it");
        check_error("{% macro m(x) %}{{ m([x, x]) }}{% endmacro %}{{ m(1) }}", "more than 200000 in it");
        for value in ["n", "[n]", "namespace(a=n)"] {
            check_error(&format!("{{% set n = namespace() %}}{{% set n.x = {value} %}}{{{{ n }}}}"), "cannot be kept");
        }
        check_error("{% set __bounded = 1 %}", "no name for templates");
        // A list that grows is as good as ever.
        assert_eq!(
            render(&format!(
                "{}{{{{ n.x | length }}}}",
                "{% set n = namespace(x=[]) %}{% for a in range(999) %}{% set n.x = n.x + [a] %}{% endfor %}"
            ))
            .unwrap(),
            "999"
        );
    }

    #[test]
    fn long_expressions_do_not_overflow_the_stack() {
        for (start, middle, end) in [
            ("{{ ", "not ", "a }}"),
            ("{{ ", "-", "a }}"),
            ("{{ a", ".a", "}}"),
            ("{{ a", "|a", "}}"),
            ("{{ a", "+a", "}}"),
            ("{{ a", " if a else a", "}}"),
            ("{{ a", "**a", "}}"),
            ("{{ a", "()", "}}"),
            ("{{ a", "[0]", "}}"),
            ("{{ a", " is a", "}}"),
            ("{% if a %}", "{% elif a %}", "{% endif %}"),
            ("{{ ", "[", ""),
            ("", "{% if a %}", ""),
            ("", "{{ [", ""),
        ] {
            for times in [200, 900, 100_000] {
                let _ = render(&[start, &middle.repeat(times), end].concat());
            }
            assert!(render(&[start, &middle.repeat(100_000), end].concat()).is_err(), "{middle}");
        }
    }
}
