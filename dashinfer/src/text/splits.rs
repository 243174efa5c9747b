//! How byte-level tokenizers split a text before they merge, by the names that GGUF files have for it (`tokenizer.ggml.pre`).
//!
//! A name is that of one tokenizer, and stands for all that split alike. The expressions are those of the `tokenizer.json` of these
//! models; a text is split by each in turn, what matches and what lies between becoming pieces of their own.

/// What goes on before merging, and whether a text gets a first token.
#[derive(Debug, PartialEq)]
pub(super) struct Splits {
    pub(super) expressions: &'static [&'static str],
    /// Whether characters are composed first (NFC).
    pub(super) compose: bool,
    /// Whether a piece that is a token is that token, however merges would make it.
    pub(super) ignore_merges: bool,
    /// Whether a text gets the first token where the file does not say.
    pub(super) add_bos: bool,
}

/// The splitting of a name; of none, the format's default.
pub(super) fn named(name: Option<&str>) -> Option<Splits> {
    let splits = |expressions| Splits { expressions, compose: false, ignore_merges: false, add_bos: false };
    Some(match name.unwrap_or("default") {
        "default" => splits(DEFAULT),
        "gpt-2" | "phi-2" | "olmo" | "mpt" | "exaone4" => splits(&[GPT2]),
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone" | "minerva-7b" => {
            splits(&[DIGIT, GPT2])
        }
        "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "pixtral" => {
            Splits { ignore_merges: true, add_bos: true, ..splits(&[LLAMA3]) }
        }
        "dbrx" | "smaug-bpe" | "chatglm-bpe" => splits(&[LLAMA3]),
        "glm4" => Splits { ignore_merges: true, ..splits(&[LLAMA3]) },
        "qwen2" | "deepseek-r1-qwen" | "megrez" => Splits { compose: true, ..splits(&[QWEN2]) },
        "stablelm2" | "hunyuan" => splits(&[QWEN2]),
        "gpt-4o" | "llama4" => Splits { ignore_merges: true, ..splits(&[GPT4O]) },
        "tekken" => Splits { ignore_merges: true, add_bos: true, ..splits(&[TEKKEN]) },
        "deepseek-v3" => splits(DEEPSEEK_V3),
        "deepseek-coder" => splits(DEEPSEEK_CODER),
        "deepseek-llm" => splits(DEEPSEEK_LLM),
        _ => return None,
    })
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

const DIGIT: &str = r"\p{N}";

/// What files without a name were made for: no tokenizer of its own, but near many.
const DEFAULT: &[&str] = &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"];

const LLAMA3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
);

const QWEN2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
);

const GPT4O: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

const DEEPSEEK_V3: &[&str] = &[
    r"\p{N}{1,3}",
    r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+",
    concat!(
        r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"##,
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
];

const DEEPSEEK_CODER: &[&str] =
    &[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[\x{4E00}-\x{9FA5}\x{800}-\x{4E00}\x{AC00}-\x{D7FF}]+", r"\p{N}"];

/// The second expression is of all letters that have a case, and the first range of it that is not ASCII starts with µ. Letters are written as
/// numbers here: several have a twin that looks the same and that editors put in their place.
const DEEPSEEK_LLM: &[&str] = &[
    r"[\r\n]",
    concat!(
        r"\s?[A-Za-z\x{B5}\x{C0}-\x{D6}\x{D8}-\x{F6}\x{F8}-\x{1BA}\x{1BC}-\x{1BF}\x{1C4}-\x{293}\x{295}-\x{2AF}",
        r"\x{370}-\x{373}\x{376}\x{377}\x{37B}-\x{37D}\x{37F}\x{386}\x{388}-\x{38A}\x{38C}\x{38E}-\x{3A1}",
        r"\x{3A3}-\x{3F5}\x{3F7}-\x{481}\x{48A}-\x{52F}\x{531}-\x{556}\x{10A0}-\x{10C5}\x{13A0}-\x{13F5}",
        r"\x{13F8}-\x{13FD}\x{1C90}-\x{1CBA}\x{1CBD}-\x{1CBF}\x{1D00}-\x{1D2B}\x{1D6B}-\x{1D77}\x{1D79}-\x{1D9A}",
        r"\x{1E00}-\x{1F15}\x{1F18}-\x{1F1D}\x{1F20}-\x{1F45}\x{1F48}-\x{1F4D}\x{1F50}-\x{1F57}\x{1F59}\x{1F5B}",
        r"\x{1F5D}\x{1F5F}-\x{1F7D}\x{1F80}-\x{1FB4}\x{1FB6}-\x{1FBC}\x{1FBE}\x{1FC2}-\x{1FC4}\x{1FC6}-\x{1FCC}",
        r"\x{1FD0}-\x{1FD3}\x{1FD6}-\x{1FDB}\x{1FE0}-\x{1FEC}\x{1FF2}-\x{1FF4}\x{1FF6}-\x{1FFC}\x{2102}\x{2107}",
        r"\x{210A}-\x{2113}\x{2115}\x{2119}-\x{211D}\x{2124}\x{2126}\x{2128}\x{212A}-\x{212D}\x{212F}-\x{2134}",
        r"\x{2139}\x{213C}-\x{213F}\x{2145}-\x{2149}\x{214E}\x{2183}\x{2184}\x{2C00}-\x{2C7B}\x{2C7E}-\x{2CE4}",
        r"\x{2CEB}-\x{2CEE}\x{2CF2}\x{2CF3}\x{A640}-\x{A66D}\x{A680}-\x{A69B}\x{A722}-\x{A76F}\x{A771}-\x{A787}",
        r"\x{A78B}-\x{A78E}\x{AB70}-\x{ABBF}\x{FB00}-\x{FB06}\x{FB13}-\x{FB17}\x{FF21}-\x{FF3A}\x{FF41}-\x{FF5A}",
        r"\x{10400}-\x{1044F}\x{104B0}-\x{104D3}\x{104D8}-\x{104FB}\x{10C80}-\x{10CB2}\x{10CC0}-\x{10CF2}",
        r"\x{118A0}-\x{118DF}\x{1E900}-\x{1E943}]+",
    ),
    r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+",
    r"\s+$",
    r"[\x{4E00}-\x{9FA5}\x{800}-\x{4E00}\x{AC00}-\x{D7FF}]+",
    r"\p{N}+",
];

/// Every name, for errors.
pub(super) const NAMES: &str = "default, gpt-2, phi-2, olmo, mpt, exaone4, smollm, starcoder, refact, command-r, codeshell, exaone, \
                                minerva-7b, llama-bpe, llama3, llama-v3, falcon3, pixtral, dbrx, smaug-bpe, chatglm-bpe, glm4, qwen2, \
                                deepseek-r1-qwen, megrez, stablelm2, hunyuan, gpt-4o, llama4, tekken, deepseek-v3, deepseek-coder, \
                                deepseek-llm";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_one_that_is_known() {
        for name in NAMES.split(", ") {
            let splits = named(Some(name)).unwrap_or_else(|| panic!("{name}"));
            for expression in splits.expressions {
                let json = serde_json::json!({"Regex": expression});
                let split =
                    serde_json::json!({"type": "Split", "pattern": json, "behavior": "Isolated", "invert": false});
                let parsed: Result<tokenizers::PreTokenizerWrapper, _> = serde_json::from_value(split);
                assert!(parsed.is_ok(), "{name}: {expression}");
            }
        }
        assert_eq!(named(None), named(Some("default")));
        assert_eq!(named(Some("bloom")), None);
    }
}
