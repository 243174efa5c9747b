//! The values of a file's metadata, and typed access to them by key.

use std::{collections::BTreeMap, ops::Range};

use super::{GgufFault, reader::Reader};
use crate::ConfigError;

/// A value. Numbers keep their sign and kind, whatever their width.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Flag(bool),
    Text(String),
    Array(Array),
}

/// Elements of one type, in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Array {
    kind: Kind,
    len: usize,
    bytes: Range<usize>,
}

/// The type of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Text,
    Array,
    U64,
    I64,
    F64,
}

impl Kind {
    /// By their numbers.
    const ALL: [Self; 13] = [
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::F32,
        Self::Bool,
        Self::Text,
        Self::Array,
        Self::U64,
        Self::I64,
        Self::F64,
    ];

    fn read(reader: &mut Reader<'_>) -> Result<Self, GgufFault> {
        let number = reader.u32()?;
        let kind = usize::try_from(number).ok().and_then(|number| Self::ALL.get(number));
        kind.copied().ok_or_else(|| reader.fault("a type of value, 0 to 12", number))
    }

    /// Bytes of a value; of texts and arrays, of their length alone.
    const fn size(self) -> u64 {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 | Self::Text => 8,
            Self::Array => 12,
        }
    }
}

impl Value {
    /// Reads a type and a value of it.
    pub(super) fn read(reader: &mut Reader<'_>) -> Result<Self, GgufFault> {
        let kind = Kind::read(reader)?;
        if kind != Kind::Array {
            return Self::of_kind(kind, reader);
        }
        let (kind, len) = (Kind::read(reader)?, reader.u64()?);
        reader.room_for(len, kind.size())?;
        let start = reader.at();
        match kind {
            Kind::Array => return Err(reader.fault("an array of plain values", "an array of arrays")),
            Kind::Text => {
                for _ in 0..len {
                    reader.string()?;
                }
            }
            _ => {
                reader.skip(len, kind.size())?;
            }
        }
        let len = len as usize; // there was room for so many
        Ok(Self::Array(Array { kind, len, bytes: start..reader.at() }))
    }

    fn of_kind(kind: Kind, reader: &mut Reader<'_>) -> Result<Self, GgufFault> {
        Ok(match kind {
            Kind::U8 => Self::Unsigned(u8::from_le_bytes(reader.array()?).into()),
            Kind::U16 => Self::Unsigned(u16::from_le_bytes(reader.array()?).into()),
            Kind::U32 => Self::Unsigned(reader.u32()?.into()),
            Kind::U64 => Self::Unsigned(reader.u64()?),
            Kind::I8 => Self::Signed(i8::from_le_bytes(reader.array()?).into()),
            Kind::I16 => Self::Signed(i16::from_le_bytes(reader.array()?).into()),
            Kind::I32 => Self::Signed(i32::from_le_bytes(reader.array()?).into()),
            Kind::I64 => Self::Signed(i64::from_le_bytes(reader.array()?)),
            Kind::F32 => Self::Float(f32::from_le_bytes(reader.array()?).into()),
            Kind::F64 => Self::Float(f64::from_le_bytes(reader.array()?)),
            Kind::Bool => match reader.array::<1>()? {
                [0] => Self::Flag(false),
                [1] => Self::Flag(true),
                [other] => return Err(reader.fault("true or false, 1 or 0", other)),
            },
            Kind::Text => Self::Text(reader.text()?.to_owned()),
            Kind::Array => return Err(reader.fault("a plain value", "an array")),
        })
    }

    fn whole(&self) -> Option<u64> {
        match self {
            Self::Unsigned(number) => Some(*number),
            Self::Signed(number) => u64::try_from(*number).ok(),
            _ => None,
        }
    }

    fn number(&self) -> Option<f64> {
        match self {
            Self::Unsigned(number) => Some(*number as f64),
            Self::Signed(number) => Some(*number as f64),
            Self::Float(number) => Some(*number),
            _ => None,
        }
    }
}

/// As errors show it.
impl std::fmt::Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const MAX_CHARS: usize = 60;
        match self {
            Self::Unsigned(number) => number.fmt(f),
            Self::Signed(number) => number.fmt(f),
            Self::Float(number) => number.fmt(f),
            Self::Flag(flag) => flag.fmt(f),
            Self::Text(text) => match text.char_indices().nth(MAX_CHARS) {
                Some((end, _)) => write!(f, "{:?}…", &text[..end]),
                None => write!(f, "{text:?}"),
            },
            Self::Array(array) => write!(f, "{} values of type {:?}", array.len, array.kind),
        }
    }
}

/// The metadata of a file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Metadata<'a> {
    values: &'a BTreeMap<String, Value>,
    file: &'a [u8],
}

impl<'a> Metadata<'a> {
    pub(super) fn new(values: &'a BTreeMap<String, Value>, file: &'a [u8]) -> Self {
        Self { values, file }
    }

    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.values.get(key)
    }

    fn typed<T>(
        &self,
        key: &str,
        wanted: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| ConfigError::value(key, wanted, value))
    }

    /// A whole number, 0 or more; of an array, the one number that all its elements are.
    pub(super) fn count(&self, key: &str) -> Result<Option<u64>, ConfigError> {
        if let Some(Value::Array(array)) = self.get(key) {
            let values = self.elements(key, array)?;
            let first = values.first().and_then(Value::whole);
            let same = first.filter(|_| values.iter().all(|value| value.whole() == first));
            let Some(same) = same else {
                return Err(ConfigError::Unsupported {
                    field: key.to_owned(),
                    found: "a list of different values".to_owned(),
                    supported: "one whole number for all layers".to_owned(),
                });
            };
            return Ok(Some(same));
        }
        self.typed(key, "a whole number", Value::whole)
    }

    /// A token id.
    pub(super) fn token_id(&self, key: &str) -> Result<Option<u32>, ConfigError> {
        self.typed(key, "a token id", |value| value.whole().and_then(|id| u32::try_from(id).ok()))
    }

    /// A number.
    pub(super) fn number(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        self.typed(key, "a number", Value::number)
    }

    /// True or false.
    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, ConfigError> {
        self.typed(key, "true or false", |value| if let Value::Flag(flag) = value { Some(*flag) } else { None })
    }

    /// A text.
    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>, ConfigError> {
        self.typed(key, "a text", |value| if let Value::Text(text) = value { Some(text.as_str()) } else { None })
    }

    /// A list of texts; none if the key is absent.
    pub(super) fn texts(&self, key: &str) -> Result<Vec<String>, ConfigError> {
        let text = |value| if let Value::Text(text) = value { Some(text) } else { None };
        self.list(key, "a list of texts", text)
    }

    /// A list of numbers; none if the key is absent.
    pub(super) fn numbers(&self, key: &str) -> Result<Vec<f32>, ConfigError> {
        self.list(key, "a list of numbers", |value| value.number().map(|number| number as f32))
    }

    /// A list of small whole numbers; none if the key is absent.
    pub(super) fn whole_numbers(&self, key: &str) -> Result<Vec<u32>, ConfigError> {
        self.list(key, "a list of whole numbers", |value| value.whole().and_then(|number| u32::try_from(number).ok()))
    }

    fn list<T>(&self, key: &str, wanted: &str, read: impl Fn(Value) -> Option<T>) -> Result<Vec<T>, ConfigError> {
        let Some(array) =
            self.typed(key, wanted, |value| if let Value::Array(array) = value { Some(array) } else { None })?
        else {
            return Ok(Vec::new());
        };
        let elements = self.elements(key, array)?.into_iter().map(read).collect::<Option<Vec<_>>>();
        elements.ok_or_else(|| ConfigError::value(key, wanted, Value::Array(array.clone())))
    }

    fn elements(&self, key: &str, array: &Array) -> Result<Vec<Value>, ConfigError> {
        let mut reader = Reader::new(&self.file[array.bytes.clone()]);
        reader.now(key);
        let elements = (0..array.len).map(|_| Value::of_kind(array.kind, &mut reader));
        elements.collect::<Result<_, _>>().map_err(|fault| match fault {
            GgufFault::Value { what, wanted, found } => ConfigError::Value { field: what, wanted, found },
            other => ConfigError::value(key, "whole values", other),
        })
    }
}
