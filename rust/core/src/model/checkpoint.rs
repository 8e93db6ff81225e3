//! A checkpoint: its config and its tensors by name, checked against the model's table.
//!
//! Opening reads headers only. Afterwards every tensor of the text model is there, with the shape
//! that the config asks for and a dtype that the kernels read. The multi-token-prediction module
//! and the vision tower are each there as a whole or not at all.

use super::gguf;
use super::recipe::Storage;
use super::tensors::{Role, TensorSpec, canonical_name, mtp_tensors, text_tensors, vision_tensors};
use crate::config::Config;
use crate::error::{Error, Result, short};
use crate::files::container::{self, ALIGNMENT, Info};
use crate::files::folder::{Folder, mlx};
use crate::files::gguf::{Gguf, Metadata, starts_like_gguf};
use crate::files::mmap::Mapping;
use crate::files::safetensors::read_header;
use crate::files::{Convention, FileTensor, SourceFile, file_name, shape_text};
use crate::quant::{BlockType, Format, Quant, fp8};
use crate::tensor::{Bytes, Dtype, Tensor};
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;
use std::sync::Arc;

/// An opened checkpoint: a folder as Hugging Face holds it, a GGUF file, or a converted file.
pub struct Checkpoint {
    pub config: Config,
    pub config_json: String,
    /// What its matrices were converted to.
    pub quant: Quant,
    /// What its numbers mean.
    pub convention: Convention,
    name: String,
    metadata: BTreeMap<String, String>,
    gguf: Option<Metadata>,
    specs: Vec<TensorSpec>,
    tensors: HashMap<String, Bound>,
    attachments: BTreeMap<String, Bytes>,
    listing: Vec<FileTensor>,
    sources: Vec<SourceFile>,
    mappings: Vec<Arc<Mapping>>,
}

/// What follows the name of an FP8 matrix in that of its scales.
const SCALES: &str = "_scale_inv";

/// A tensor of the model and where it was found.
struct Bound {
    tensor: Tensor,
    place: String,
}

impl Checkpoint {
    /// Opens a folder, a GGUF file, or a converted file.
    pub fn open(path: &Path) -> Result<Checkpoint> {
        let metadata = fs::metadata(path).map_err(|e| Error::io(path, e))?;
        if metadata.is_dir() {
            return Checkpoint::open_folder(path);
        }
        let mapping = Mapping::open(path)?;
        let bytes = mapping.bytes();
        let called_gguf = path.extension().is_some_and(|end| end == "gguf");
        // What is called so and is none gets an error that says so.
        if starts_like_gguf(&bytes) || called_gguf && !container::starts_like_converted(&bytes) {
            return Checkpoint::from_gguf(Gguf::open(path)?);
        }
        let checkpoint = Checkpoint::open_converted(bytes, file_name(path))?;
        Ok(Checkpoint { mappings: vec![mapping], ..checkpoint })
    }

    /// The model in a GGUF file.
    pub fn from_gguf(gguf: Gguf) -> Result<Checkpoint> {
        let name = gguf.metadata.file().to_owned();
        let config_json = gguf::config_json(&gguf)?;
        let config = Config::from_json(&config_json, &format!("{name}: metadata as config.json"))?;
        let found = gguf::tensors(&gguf, config.num_hidden_layers)?;
        let (specs, tensors) = bind(&config, Kind::Gguf, &name, &found)?;
        let Gguf { metadata, tensors: listing, mappings } = gguf;
        Ok(Checkpoint {
            config,
            config_json,
            quant: Quant::None,
            convention: Convention::Gguf,
            name,
            metadata: BTreeMap::new(),
            gguf: Some(metadata),
            specs,
            tensors,
            attachments: BTreeMap::new(),
            listing,
            sources: mappings.iter().map(|m| m.source().clone()).collect(),
            mappings,
        })
    }

    fn open_folder(path: &Path) -> Result<Checkpoint> {
        let Folder { config_json, tensors: mut listing, unlisted, mappings, sources } =
            Folder::open(path)?;
        let config = Config::from_json(&config_json, "config.json")?;
        let name = path.display().to_string();
        let found: Vec<_> = listing.iter().map(|t| (canonical_name(&t.name), t.clone())).collect();
        let (specs, tensors) = bind(&config, Kind::Folder, &name, &found)?;
        listing.extend(unlisted);
        Ok(Checkpoint {
            config,
            config_json,
            quant: Quant::None,
            convention: Convention::Transformers,
            name,
            metadata: BTreeMap::new(),
            gguf: None,
            specs,
            tensors,
            attachments: BTreeMap::new(),
            listing,
            sources,
            mappings,
        })
    }

    /// Opens a converted file that lies in memory. name: for errors.
    pub fn open_converted(bytes: Bytes, name: String) -> Result<Checkpoint> {
        let header = read_header(&bytes, &name)?;
        let Info { quant, convention, config_json, sources } =
            Info::from_metadata(&header.metadata, &name)?;
        let config = Config::from_json(&config_json, &format!("{name}: config.json"))?;
        let (mut found, mut attachments) = (Vec::new(), BTreeMap::new());
        for entry in header.entries {
            if container::is_padding(&entry.name) {
                continue;
            }
            if !entry.range.start.is_multiple_of(ALIGNMENT) {
                return Err(Error::File(format!(
                    "{name}: tensor `{}`: starts at byte {}, expected a multiple of {ALIGNMENT}",
                    short(&entry.name),
                    entry.range.start
                )));
            }
            let bytes = bytes.slice(entry.range);
            if let Some(file) = container::attachment_name(&entry.name) {
                attachments.insert(file.to_owned(), bytes);
            } else {
                let (dtype, shape, file) = (entry.dtype, entry.shape, name.clone());
                let tensor = FileTensor { name: entry.name.clone(), dtype, shape, bytes, file };
                found.push((entry.name, tensor));
            }
        }
        let (specs, tensors) = bind(&config, Kind::Converted, &name, &found)?;
        Ok(Checkpoint {
            config,
            config_json,
            quant,
            convention,
            name,
            metadata: header.metadata,
            gguf: None,
            specs,
            tensors,
            attachments,
            listing: found.into_iter().map(|(_, tensor)| tensor).collect(),
            sources,
            mappings: Vec::new(),
        })
    }

    /// What errors call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A tensor of the model. Names are those of the table; a packed matrix of a converted file
    /// ends in its format, like `w4`, in place of `weight` and is U8 [panels, bytes of a panel].
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name).map(|bound| &bound.tensor)
    }

    /// File and name of a tensor of the model, as errors say it.
    pub fn place(&self, name: &str) -> String {
        match self.tensors.get(name) {
            Some(bound) => bound.place.clone(),
            None => format!("{}: tensor `{name}`", self.name),
        }
    }

    /// A tensor as f32, or an error if one of its values is not finite.
    pub fn floats(&self, name: &str) -> Result<Vec<f32>> {
        let wrong = |text: String| Error::File(format!("{}{text}", self.place(name)));
        let tensor = self.tensor(name).ok_or_else(|| wrong(" is missing".to_owned()))?;
        if !tensor.dtype.is_float() {
            let found = tensor.dtype.name();
            return Err(wrong(format!(": dtype {found}, expected BF16, F16 or F32")));
        }
        let values = tensor.to_f32();
        match values.iter().position(|x| !x.is_finite()) {
            None => Ok(values),
            Some(i) => {
                Err(wrong(format!(": element {i} is {}, expected a finite number", values[i])))
            }
        }
    }

    /// Reads the tensors where one value that is not finite spoils every token: norms, convolution
    /// taps, A_log, dt_bias. They are a thousandth of the weights.
    pub fn check_values(&self) -> Result<()> {
        // Reading a file that was cut short would end the process.
        self.check_unchanged()?;
        let mut small = self.specs.iter().filter(|spec| spec.role == Role::Small);
        small.try_for_each(|spec| self.floats(&spec.name).map(drop))
    }

    /// The tensors of the model that are there, in the order of their use.
    pub fn specs(&self) -> &[TensorSpec] {
        &self.specs
    }

    /// Those of them that are matrices of the text model or of multi-token prediction.
    pub fn matrices(&self) -> impl Iterator<Item = &TensorSpec> {
        self.specs.iter().filter(|spec| {
            spec.shape.len() == 2 && !matches!(spec.role, Role::Vision | Role::Small)
        })
    }

    pub fn has_mtp(&self) -> bool {
        self.specs.iter().any(|spec| spec.name.starts_with("mtp."))
    }

    pub fn has_vision(&self) -> bool {
        self.specs.iter().any(|spec| spec.role == Role::Vision)
    }

    /// A file of the checkpoint folder that travels in the converted file.
    pub fn attachment(&self, name: &str) -> Option<Bytes> {
        self.attachments.get(name).cloned()
    }

    /// Names of all attached files.
    pub fn attachments(&self) -> impl Iterator<Item = &str> {
        self.attachments.keys().map(String::as_str)
    }

    /// Metadata of a converted file; empty for a folder.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The metadata of a GGUF file.
    pub fn gguf(&self) -> Option<&Metadata> {
        self.gguf.as_ref()
    }

    /// The files of the checkpoint; for a converted file, those it was made from.
    pub fn sources(&self) -> &[SourceFile] {
        &self.sources
    }

    /// All tensors as the files have them, those that the model does not use included: name,
    /// dtype, or format of a packed matrix, shape, bytes, file.
    pub fn listing(&self) -> Vec<(String, String, Vec<usize>, usize, String)> {
        let row = |t: &FileTensor| {
            let format = Format::all_quantised()
                .map(Format::name)
                .filter(|_| self.quant != Quant::None)
                .find(|format| t.name.ends_with(&format!(".{format}")));
            let dtype = format.unwrap_or(&t.dtype).to_owned();
            (t.name.clone(), dtype, t.shape.clone(), t.bytes.len(), t.file.clone())
        };
        self.listing.iter().map(row).collect()
    }

    /// Names of tensors of a folder or GGUF file of which nothing is known: nothing reads them, and
    /// they belong to no part that a text model goes without, nor are they the head that a tied
    /// model may carry again, or frequencies that old programs stored.
    pub fn unknown(&self) -> impl Iterator<Item = &str> {
        let layers = self.config.num_hidden_layers;
        let names = self.listing.iter().filter(|_| self.quant == Quant::None);
        names.map(|tensor| tensor.name.as_str()).filter(move |name| match self.convention {
            Convention::Gguf => !gguf::is_known(name, layers),
            Convention::Transformers => {
                let name = canonical_name(name);
                // The scales of an FP8 matrix are a part of it.
                let name = name.strip_suffix(SCALES).unwrap_or(&name);
                let apart = ["mtp.", "visual."].iter().any(|start| name.starts_with(start))
                    || ["lm_head.weight", "rotary_emb.inv_freq"].iter().any(|n| name.ends_with(n));
                !apart && !self.tensors.contains_key(name)
            }
        })
    }

    /// An error if a mapped file is not what it was when it was opened.
    pub fn check_unchanged(&self) -> Result<()> {
        self.mappings.iter().try_for_each(|mapping| mapping.check_unchanged())
    }

    /// Asks the system to read the files ahead.
    pub fn will_need(&self) {
        self.mappings.iter().for_each(|mapping| mapping.will_need());
    }

    /// Lets the system take back the memory of a part of a tensor that will not be read soon.
    pub fn release(&self, part: &[u8]) {
        self.mappings.iter().for_each(|mapping| mapping.release(part));
    }
}

/// What tensors come from, which decides their formats.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Folder,
    Gguf,
    Converted,
}

/// Finds the tensors of the model among those of the files.
///
/// place: what the tensors come from, for errors; found: by canonical name.
fn bind(
    config: &Config,
    kind: Kind,
    place: &str,
    found: &[(String, FileTensor)],
) -> Result<(Vec<TensorSpec>, HashMap<String, Bound>)> {
    let mut by_name: HashMap<&str, &FileTensor> = HashMap::with_capacity(found.len());
    let mut twice: HashMap<&str, &FileTensor> = HashMap::new();
    for (name, tensor) in found {
        if let Some(other) = by_name.insert(name, tensor) {
            twice.insert(name, other);
        }
    }

    let present = |spec: &TensorSpec| {
        storages(spec, kind).any(|storage| by_name.contains_key(storage.name(spec).as_str()))
    };
    let mut specs = text_tensors(config);
    let vision = config.vision.as_ref().map(vision_tensors).unwrap_or_default();
    for optional in [mtp_tensors(config), vision] {
        if optional.iter().any(present) {
            specs.extend(optional);
        }
    }
    let refuse_twice = |name: &str, tensor: &FileTensor| match twice.get(name) {
        None => Ok(()),
        Some(other) => Err(Error::File(format!(
            "{}: is `{name}`, and so is tensor `{}` of {}",
            tensor.place(),
            short(&other.name),
            other.file
        ))),
    };
    let mut tensors = HashMap::with_capacity(specs.len());
    for spec in &specs {
        let mut there = storages(spec, kind).filter_map(|storage| {
            let name = storage.name(spec);
            let tensor = *by_name.get(name.as_str())?;
            Some((storage, name, tensor))
        });
        let (storage, name, tensor) =
            there.next().ok_or_else(|| missing(config, kind, place, &spec.name))?;
        if let Some((.., other)) = there.next() {
            return Err(Error::File(format!(
                "{}: is `{}`, and so is tensor `{}` of {}",
                tensor.place(),
                spec.name,
                short(&other.name),
                other.file
            )));
        }
        refuse_twice(&name, tensor)?;
        let place = tensor.place();
        let mut tensor = check(config, kind, spec, storage, tensor)?;
        if tensor.dtype == Dtype::Fp8 {
            let name = format!("{name}{SCALES}");
            let found = by_name.get(name.as_str()).ok_or_else(|| {
                Error::File(format!("{place}: its scales are missing, tensor `{name}`"))
            })?;
            refuse_twice(&name, found)?;
            tensor.scales = Some(Arc::new(check_scales(&tensor, found)?));
        }
        tensors.insert(name, Bound { tensor, place });
    }
    refuse_companions(&tensors, &by_name)?;
    Ok((specs, tensors))
}

/// How a tensor may be stored.
fn storages(spec: &TensorSpec, kind: Kind) -> impl Iterator<Item = Storage> {
    let (small, converted) = (spec.role == Role::Small, kind == Kind::Converted);
    let plain = if converted && small { Storage::F32 } else { Storage::AsIs };
    let coded = Format::all_quantised()
        .filter(move |_| converted && !small)
        .filter(|format| spec.role != Role::Vision && format.takes_cols(spec.rows_cols().1))
        .map(Storage::Coded);
    std::iter::once(plain).chain(coded)
}

fn missing(config: &Config, kind: Kind, place: &str, name: &str) -> Error {
    let why = if name.starts_with("lm_head.") && !config.tie_word_embeddings {
        ", expected because `tie_word_embeddings` is false"
    } else if name.starts_with("mtp.") || name.starts_with("visual.") {
        ", expected because others of its part are there"
    } else {
        ""
    };
    let name = match kind {
        Kind::Gguf => gguf::gguf_name(name, config.num_hidden_layers),
        Kind::Folder | Kind::Converted => name.to_owned(),
    };
    Error::File(format!("{place}: tensor `{name}` is missing{why}"))
}

/// Checks dtype and shape of a tensor.
fn check(
    config: &Config,
    kind: Kind,
    spec: &TensorSpec,
    storage: Storage,
    found: &FileTensor,
) -> Result<Tensor> {
    let place = found.place();
    let kernel = config.linear_conv_kernel_dim;
    let conv1d = kind != Kind::Gguf && spec.name.ends_with("conv1d.weight");
    if conv1d && kernel != 1 && found.shape.last() == Some(&1) {
        let transposed = format!("shape {}, expected {:?}", shape_text(&found.shape), spec.shape);
        return Err(mlx(&place, &transposed));
    }
    let blocks = kind == Kind::Gguf && !matches!(spec.role, Role::Small | Role::Vision);
    let fp8 = config.fp8
        && kind == Kind::Folder
        && spec.role != Role::Small
        && matches!(spec.shape[..], [_, _]);
    let expected = match storage {
        Storage::AsIs if fp8 => "BF16, F16, F32 or F8_E4M3",
        Storage::AsIs => "BF16, F16 or F32",
        Storage::F32 => "F32",
        Storage::Coded(_) => "U8",
    };
    let fits = |dtype: &Dtype| match storage {
        Storage::AsIs => match dtype {
            Dtype::Fp8 => fp8,
            Dtype::Blocks(_) => blocks,
            dtype => dtype.is_float(),
        },
        Storage::F32 => *dtype == Dtype::F32,
        Storage::Coded(_) => *dtype == Dtype::U8,
    };
    let dtype = found.known_dtype().filter(fits).ok_or_else(|| match blocks {
        true => Error::Unsupported(format!(
            "{place}: type {}, supported are {expected}, {}; use a file of these types",
            short(&found.dtype),
            BlockType::ALL.map(BlockType::name).join(", ")
        )),
        false => {
            Error::File(format!("{place}: dtype {}, expected {expected}", short(&found.dtype)))
        }
    })?;
    let shape = storage.shape(spec);
    if found.shape != shape {
        return Err(Error::File(format!(
            "{place}: shape {}, expected {shape:?}",
            shape_text(&found.shape)
        )));
    }
    Ok(Tensor { dtype, shape, bytes: found.bytes.clone(), scales: None })
}

/// Checks the scales of an FP8 matrix.
fn check_scales(matrix: &Tensor, found: &FileTensor) -> Result<Tensor> {
    let place = found.place();
    let float = |dtype: &Dtype| dtype.is_float() && *dtype != Dtype::Fp8;
    let dtype = found.known_dtype().filter(float).ok_or_else(|| {
        Error::File(format!("{place}: dtype {}, expected BF16, F16 or F32", short(&found.dtype)))
    })?;
    let shape: Vec<usize> = matrix.shape.iter().map(|n| n.div_ceil(fp8::BLOCK)).collect();
    if found.shape != shape {
        return Err(Error::File(format!(
            "{place}: shape {}, expected {shape:?}, a scale for each block of {} x {}",
            shape_text(&found.shape),
            fp8::BLOCK,
            fp8::BLOCK
        )));
    }
    Ok(Tensor { dtype, shape, bytes: found.bytes.clone(), scales: None })
}

/// Refuses what changes the meaning of a weight: a bias, scales that are not those of FP8, an
/// adapter. Other tensors that the model does not have are ignored.
fn refuse_companions(
    tensors: &HashMap<String, Bound>,
    by_name: &HashMap<&str, &FileTensor>,
) -> Result<()> {
    const COMPANIONS: [&str; 9] = [
        ".scale",
        ".input_scale",
        ".activation_scale",
        ".bias",
        ".weight_scale",
        ".weight_scale_inv",
        ".scales",
        ".lora_A.weight",
        ".lora_B.weight",
    ];
    let companion = by_name
        .iter()
        .filter(|(name, _)| !tensors.contains_key(**name))
        .filter(|(name, _)| {
            let scales_fp8 = |name| tensors.get(name).is_some_and(|b| b.tensor.scales.is_some());
            !name.strip_suffix(SCALES).is_some_and(scales_fp8)
        })
        .filter(|(name, _)| {
            let stem = COMPANIONS.iter().find_map(|end| name.strip_suffix(end));
            stem.is_some_and(|stem| tensors.contains_key(&format!("{stem}.weight")))
        })
        .min_by_key(|(name, _)| *name);
    match companion {
        None => Ok(()),
        Some((_, tensor)) => Err(Error::Unsupported(format!(
            "{}: changes a weight in a way that is not supported, expected no such tensor",
            tensor.place()
        ))),
    }
}
