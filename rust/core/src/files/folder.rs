//! A checkpoint folder as Hugging Face holds it: config.json and one or many safetensors files.

use super::mmap::Mapping;
use super::safetensors::read_header;
use super::{FileTensor, SourceFile, container, file_name, read_text};
use crate::error::{Error, Result, json_text, short};
use serde_json::Value;
use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io::ErrorKind;
use std::path::{Component, Path};
use std::sync::Arc;

const CONFIG: &str = "config.json";
const INDEX_SUFFIX: &str = ".safetensors.index.json";
const INDEX: &str = "model.safetensors.index.json";
const LONE: &str = "model.safetensors";
/// Published configs have some kilobytes.
const MOST_CONFIG: u64 = 16 << 20;
/// As long as the header of a file.
const MOST_INDEX: u64 = 100_000_000;

/// The files of a folder, mapped.
pub struct Folder {
    pub config_json: String,
    /// Those that count. Names are unique.
    pub tensors: Vec<FileTensor>,
    /// Those in the files that the index does not name.
    pub unlisted: Vec<FileTensor>,
    pub mappings: Vec<Arc<Mapping>>,
    /// config.json, the index if there is one, and the files with tensors.
    pub sources: Vec<SourceFile>,
}

/// Where each tensor is.
struct Index {
    name: String,
    weight_map: HashMap<String, String>,
}

impl Folder {
    pub fn open(path: &Path) -> Result<Folder> {
        let (config_json, config) = match read_text(&path.join(CONFIG), MOST_CONFIG) {
            Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {
                let ggufs = names_ending(path, ".gguf")?;
                let instead = match ggufs.first() {
                    Some(name) => {
                        format!("; for a GGUF file in it name the file, as {}", short(name))
                    }
                    None => String::new(),
                };
                return Err(Error::File(format!(
                    "{}: no {CONFIG}, expected a checkpoint folder as Hugging Face holds it{instead}",
                    path.display()
                )));
            }
            other => other?,
        };
        let mut sources = vec![config];
        let (shards, index) = match find_index(path)? {
            Some((index, source)) => {
                sources.push(source);
                (index.shards(path)?, Some(index))
            }
            None => (vec![find_lone(path)?], None),
        };

        let mut folder = Folder {
            config_json,
            tensors: Vec::new(),
            unlisted: Vec::new(),
            mappings: Vec::new(),
            sources,
        };
        for shard in &shards {
            folder.add(&path.join(shard), index.as_ref())?;
        }
        if let Some(index) = index {
            let found: BTreeSet<&str> = folder.tensors.iter().map(|t| t.name.as_str()).collect();
            let mut missing: Vec<_> = index
                .weight_map
                .iter()
                .filter(|(name, _)| !found.contains(name.as_str()))
                .collect();
            missing.sort();
            if let Some((name, shard)) = missing.first() {
                return Err(Error::File(format!(
                    "{shard}: tensor `{}` is missing, {} says it is there",
                    short(name),
                    index.name
                )));
            }
        }
        Ok(folder)
    }

    fn add(&mut self, path: &Path, index: Option<&Index>) -> Result<()> {
        let (mapping, file) = (Mapping::open(path)?, file_name(path));
        let bytes = mapping.bytes();
        let header = read_header(&bytes, &file)?;
        if container::is_converted(&header.metadata) {
            return Err(Error::File(format!(
                "{file}: a converted file, expected the checkpoint; open the file itself"
            )));
        }
        if header.metadata.get("format").is_some_and(|format| format == "mlx") {
            return Err(mlx(&file, "metadata `format` is \"mlx\""));
        }
        for entry in header.entries {
            let tensor = FileTensor {
                bytes: bytes.slice(entry.range),
                name: entry.name,
                dtype: entry.dtype,
                shape: entry.shape,
                file: file.clone(),
            };
            let listed = index.is_none_or(|i| i.weight_map.get(&tensor.name) == Some(&file));
            if listed { &mut self.tensors } else { &mut self.unlisted }.push(tensor);
        }
        self.sources.push(mapping.source().clone());
        self.mappings.push(mapping);
        Ok(())
    }
}

/// Why a checkpoint written by MLX is refused. what: how it is known.
pub fn mlx(place: &str, what: &str) -> Error {
    Error::Unsupported(format!(
        "{place}: {what}: the checkpoint was saved for MLX, which stores other numbers under the \
         same names (norm weights with 1 added, convolutions transposed); use the original \
         checkpoint, or a GGUF file of it"
    ))
}

/// Names in a folder that end so, in order.
fn names_ending(path: &Path, suffix: &str) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(path).map_err(|e| Error::io(path, e))? {
        let name = entry.map_err(|e| Error::io(path, e))?.file_name();
        let name = name.to_string_lossy();
        if name.ends_with(suffix) && !name.starts_with('.') {
            names.push(name.into_owned());
        }
    }
    names.sort();
    Ok(names)
}

fn find_index(path: &Path) -> Result<Option<(Index, SourceFile)>> {
    let names = names_ending(path, INDEX_SUFFIX)?;
    let name = match names.as_slice() {
        [] => return Ok(None),
        _ if names.iter().any(|name| name == INDEX) => INDEX.to_owned(),
        [name] => name.clone(),
        _ => {
            return Err(Error::File(format!(
                "{}: several indexes ({}), expected {INDEX}",
                path.display(),
                names.join(", ")
            )));
        }
    };
    let (text, source) = read_text(&path.join(&name), MOST_INDEX)?;
    let wrong = |text: String| Error::File(format!("{name}: {text}"));
    let mut json: Value = serde_json::from_str(&text)
        .map_err(|e| wrong(format!("not valid JSON: {}", json_text(&e))))?;
    let weight_map = match json.get_mut("weight_map").map(Value::take) {
        Some(Value::Object(weight_map)) => weight_map,
        Some(_) => return Err(wrong("`weight_map` is no object".to_owned())),
        None => return Err(wrong("`weight_map` is missing".to_owned())),
    };
    let weight_map = weight_map.into_iter().map(|(tensor, shard)| match shard {
        Value::String(shard) if is_plain_name(&shard) => Ok((tensor, shard)),
        other => Err(wrong(format!(
            "`weight_map` has {} for tensor `{}`, expected the name of a file in this folder",
            short(&other.to_string()),
            short(&tensor)
        ))),
    });
    let weight_map = weight_map.collect::<Result<_>>()?;
    Ok(Some((Index { name, weight_map }, source)))
}

/// Whether a name stays in its folder on every system.
fn is_plain_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name)
        && !name.contains(['/', '\\', ':', '\0'])
}

impl Index {
    /// The files that it names, in order. They exist.
    fn shards(&self, path: &Path) -> Result<Vec<String>> {
        let shards: BTreeSet<&String> = self.weight_map.values().collect();
        if shards.is_empty() {
            return Err(Error::File(format!("{}: `weight_map` names no tensor", self.name)));
        }
        for shard in &shards {
            if !path.join(shard).exists() {
                return Err(Error::File(format!(
                    "{}: not in the folder {}, {} names it",
                    short(shard),
                    path.display(),
                    self.name
                )));
            }
        }
        Ok(shards.into_iter().cloned().collect())
    }
}

fn find_lone(path: &Path) -> Result<String> {
    let names = names_ending(path, ".safetensors")?;
    match names.as_slice() {
        _ if names.iter().any(|name| name == LONE) => Ok(LONE.to_owned()),
        [name] => Ok(name.clone()),
        [] => Err(Error::File(format!(
            "{}: no file ends in .safetensors, expected {LONE} or {INDEX}",
            path.display()
        ))),
        _ => Err(Error::File(format!(
            "{}: several files end in .safetensors ({}), expected {LONE}, or {INDEX} to say which \
             count",
            path.display(),
            names.join(", ")
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_names() {
        for name in
            ["model.safetensors", "model.safetensors-00001-of-00002.safetensors", "..a", "é"]
        {
            assert!(is_plain_name(name), "{name}");
        }
        for name in [
            "", ".", "..", "../a", "a/b", "/a", "a/", "./a", "a\\b", "..\\a", "C:a", "C:\\a", "a\0",
        ] {
            assert!(!is_plain_name(name), "{name}");
        }
    }
}
