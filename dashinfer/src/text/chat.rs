//! Chats to prompts, by the template that comes with a checkpoint.

use std::collections::BTreeMap;
use std::sync::Arc;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Value};
use serde::{Deserialize, Serialize};

use super::{bounds, python};

/// One turn of a chat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Message {
    /// Who speaks: `user`, `system`, `assistant`, `tool`, or another role that the checkpoint's template knows.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A message in any role.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }

    /// What the user says.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new("user", content)
    }

    /// What the model is told about its task.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new("system", content)
    }

    /// What the model said before.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new("assistant", content)
    }

    /// What a tool answered.
    pub fn tool(content: impl Into<String>) -> Self {
        Self::new("tool", content)
    }
}

/// What a chat template is given beside the messages.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct ChatOptions {
    /// Whether the prompt ends where the assistant is to speak. Default: true.
    pub add_generation_prompt: bool,
    /// Variables of the template, such as `enable_thinking` of Qwen3. Default: none. They come before the special
    /// tokens' names, and after `messages`, `tools`, `documents` and `add_generation_prompt`.
    pub variables: BTreeMap<String, serde_json::Value>,
}

impl Default for ChatOptions {
    fn default() -> Self {
        Self { add_generation_prompt: true, variables: BTreeMap::new() }
    }
}

impl ChatOptions {
    /// Sets [`add_generation_prompt`](Self::add_generation_prompt).
    pub fn add_generation_prompt(mut self, yes: bool) -> Self {
        self.add_generation_prompt = yes;
        self
    }

    /// Sets one of the [`variables`](Self::variables).
    pub fn variable(mut self, name: impl Into<String>, value: impl Into<serde_json::Value>) -> Self {
        self.variables.insert(name.into(), value.into());
        self
    }
}

/// Why a chat template gave no prompt.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateError {
    /// The template cannot be compiled.
    #[error("the chat template cannot be compiled")]
    Syntax {
        /// What is wrong, and where.
        source: Arc<minijinja::Error>,
    },
    /// The template turned the chat down, by `raise_exception`.
    #[error("the chat template refused the chat: {message}")]
    Refused {
        /// What the template said.
        message: String,
    },
    /// The template failed on this chat.
    #[error("the chat template failed")]
    Render {
        /// What is wrong, and where.
        source: Arc<minijinja::Error>,
    },
}

/// A compiled chat template, in the Jinja dialect that `transformers` renders.
///
/// Blocks are trimmed and stripped; there are `raise_exception`, `strftime_now` (in UTC), `tojson` as Python spells it,
/// Python's methods of strings, lists and dicts, `break` and `continue`. `tools` and `documents` are none.
///
/// Rendering ends: a template that loops, or that makes texts and values of sizes out of all proportion to the chat, fails.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: BTreeMap<String, String>,
}

const NAME: &str = "chat_template";

impl ChatTemplate {
    /// Compiles a template; `special_tokens` (`bos_token` and its like) are variables of it.
    ///
    /// # Errors
    /// [`TemplateError::Syntax`] if it cannot be compiled.
    pub fn new(source: impl Into<String>, special_tokens: BTreeMap<String, String>) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.expect("the delimiters are the usual ones"));
        python::add_to(&mut environment);
        bounds::add_to(&mut environment);
        bounds::guarded(&python::without_generation_blocks(&source.into()))
            .and_then(|source| environment.add_template_owned(NAME, source))
            .map_err(|source| TemplateError::Syntax { source: Arc::new(source) })?;
        Ok(Self { environment, special_tokens })
    }

    /// Writes the prompt of a chat.
    ///
    /// # Errors
    /// [`TemplateError::Refused`] if the template raises an exception, such as for roles out of order;
    /// [`TemplateError::Render`] if it uses what is not there.
    pub fn render(&self, messages: &[Message], options: &ChatOptions) -> Result<String, TemplateError> {
        let mut variables: BTreeMap<&str, Value> = BTreeMap::new();
        variables.extend(self.special_tokens.iter().map(|(name, token)| (name.as_str(), Value::from(token))));
        variables.extend(options.variables.iter().map(|(name, value)| (name.as_str(), Value::from(Serde(value)))));
        variables.insert("messages", Value::from(Serde(messages)));
        variables.insert("tools", Value::from(()));
        variables.insert("documents", Value::from(()));
        variables.insert("add_generation_prompt", Value::from(options.add_generation_prompt));
        bounds::RESERVED.iter().for_each(|name| drop(variables.remove(name)));
        let mut environment = self.environment.clone();
        let num_bytes = messages.iter().map(|message| message.role.len() + message.content.len()).sum();
        environment.set_fuel(Some(bounds::fuel(messages.len(), num_bytes)));
        environment.get_template(NAME).and_then(|template| template.render(Value::from_pairs(variables))).map_err(
            |source| match python::raised(&source) {
                Some(message) => TemplateError::Refused { message: message.to_owned() },
                None => TemplateError::Render { source: Arc::new(source) },
            },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(template: &str, messages: &[Message]) -> Result<String, TemplateError> {
        let tokens = BTreeMap::from([("bos_token".to_owned(), "<s>".to_owned())]);
        ChatTemplate::new(template, tokens)?.render(messages, &ChatOptions::default().variable("thinking", false))
    }

    fn check(template: &str, want: &str) {
        let messages = [Message::system("Be <brief>."), Message::user(" hi ")];
        assert_eq!(render(template, &messages).unwrap(), want, "{template}");
    }

    #[test]
    fn a_template_sees_what_transformers_gives_it() {
        check("{{ bos_token }}{{ messages[1]['content'] | trim }}{{ messages|length }}", "<s>hi2");
        check("{% if tools is none and documents is none and eos_token is not defined %}ok{% endif %}", "ok");
        check("{% if not thinking and add_generation_prompt %}ok{% endif %}", "ok");
    }

    #[test]
    fn blocks_are_trimmed_and_stripped() {
        check(
            "{% for m in messages %}\n    {% if true %}\n{{ m.role }}\n    {% endif %}\n{% endfor %}\n",
            "system\nuser\n",
        );
    }

    #[test]
    fn python_methods_loop_controls_and_namespaces_work() {
        check("{{ messages[1].content.strip().upper() }}{{ 'a,b'.split(',')[-1] }}", "HIb");
        check(
            "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
            "user",
        );
        check(
            "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
            "2",
        );
        check("{% for m in messages[::-1] %}{{ m.role[:1] }}{% endfor %}", "us");
    }

    #[test] // the expectations were printed by Jinja 3.1 with the settings of `transformers`
    fn values_print_and_test_as_in_python() {
        check(
            "{{ none }}|{{ true }}|{{ 1.0 }}|{{ [1, 'a', none] }}|{{ 7 // 2 }}|{{ 7 / 2 }}",
            "None|True|1.0|[1, 'a', None]|3|3.5",
        );
        check(
            "{{ 'x' is sequence }}|{{ 'x' is iterable }}|{{ 'x' is mapping }}|{{ messages[0] is sequence }}",
            "True|True|False|True",
        );
        check(
            "{{ 'tool_calls' in messages[0] }}|{{ messages[0].get('name') }}|{{ messages[0].name is defined }}",
            "False|None|False",
        );
        check("{{ '<think>\\na</think>\\n b'.split('</think>')[-1].lstrip('\\n') }}", " b");
        check("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1");
        check(
            "{%- macro text(c) -%}{%- if c is string -%}{{ c }}{%- endif -%}{%- endmacro -%}[{{ text('a') }}]",
            "[a]",
        );
    }

    #[test]
    fn json_is_spelt_as_python_spells_it() {
        check("{{ messages[0] | tojson }}", r#"{"role": "system", "content": "Be <brief>."}"#);
        check("{{ {'b': [1, 2.0, none], 'a': true} | tojson }}", r#"{"b": [1, 2.0, null], "a": true}"#);
        check("{{ [1, {'a': 2}] | tojson(separators=(',', ':')) }}", r#"[1,{"a":2}]"#);
        check("{{ {'é': []} | tojson(indent=4) }}", "{\n    \"é\": []\n}");
    }

    #[test]
    fn blocks_that_mark_generated_text_are_transparent() {
        check("{%- generation %}{{ messages[0].role }}{%- endgeneration -%}  \n!", "system!");
    }

    fn cause(error: &TemplateError) -> String {
        std::error::Error::source(error).unwrap().to_string()
    }

    #[test]
    fn a_refusal_is_told_from_a_failure() {
        let error = render("{{ raise_exception('roles must alternate') }}", &[]).unwrap_err();
        assert_eq!(error.to_string(), "the chat template refused the chat: roles must alternate");
        let error = render("{% if messages[0].content.nothing.at_all %}{% endif %}", &[Message::user("")]).unwrap_err();
        assert_eq!(error.to_string(), "the chat template failed");
        assert!(cause(&error).starts_with("undefined value"), "{error:?}");
        let error = render("{{ [1] | tojson(sort_keys=true) }}", &[]).unwrap_err();
        assert!(cause(&error).contains("tojson has no sort_keys here, wanted false or nothing"), "{error:?}");
        let error = render("{% for %}", &[]).unwrap_err();
        assert_eq!(error.to_string(), "the chat template cannot be compiled");
        assert!(cause(&error).starts_with("syntax error"), "{error:?}");
    }
}
