//! Conversion: what the file holds, and what it leaves behind when it fails.

mod common;

use common::{FILE, Folder, Stored, TEXT, Tiny, config, join, split};
use qdelta_core::convert::{Attachment, Job, Progress, verify};
use qdelta_core::model::checkpoint::Checkpoint;
use qdelta_core::model::recipe::{Storage, storage};
use qdelta_core::quant::{PANEL_ROWS, Quant, encode_panel, panel_bytes, planes};
use qdelta_core::{Error, Result};
use serde_json::json;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

const OUT: &str = "out.safetensors";

fn run(folder: &Folder, quant: Quant) -> Result<PathBuf> {
    let out = folder.path(OUT);
    run_to(folder, quant, &out, Some(2)).map(|()| out)
}

fn run_to(folder: &Folder, quant: Quant, out: &Path, threads: Option<usize>) -> Result<()> {
    fs::write(folder.path("tokenizer.json"), b"some text").expect("a file");
    fs::write(folder.path("empty"), b"").expect("a file");
    let attachments = [
        ("tokenizer.json".to_owned(), Attachment::Path(folder.path("tokenizer.json"))),
        ("empty".to_owned(), Attachment::Path(folder.path("empty"))),
        ("made".to_owned(), Attachment::Content(b"a text".to_vec())),
    ];
    let source = folder.open();
    let job = Job { attachments: &attachments, threads, ..Job::new(&source, quant) };
    job.to_file(out, &mut |_, _| true)
}

/// Converts without attachments.
fn convert(source: &Checkpoint, quant: Quant, out: &Path, progress: &mut Progress) -> Result<()> {
    Job::new(source, quant).to_file(out, progress)
}

#[test]
fn memory_holds_the_bytes_of_the_file() {
    let folder = Tiny::default().write();
    let source = folder.open();
    let out = folder.path(OUT);
    convert(&source, Quant::W4, &out, &mut |_, _| true).expect("a converted file");
    let job = Job { threads: Some(3), ..Job::new(&source, Quant::W4) };
    let bytes = job.to_memory(&mut |_, _| true).expect("converted bytes");
    assert_eq!(bytes[..], fs::read(&out).expect("the file"));
    let opened = Checkpoint::open_converted(bytes, "memory".to_owned()).expect("a checkpoint");
    assert_eq!(opened.sources(), source.sources());
    opened.check_unchanged().expect("nothing can change");
    let error = job.to_memory(&mut |_, _| false).expect_err("interrupted");
    assert!(matches!(error, Error::Interrupted));
}

/// Names in the folder that a failed conversion must not add.
fn leftovers(folder: &Folder) -> Vec<String> {
    let names = fs::read_dir(folder.root()).expect("the folder").map(|entry| {
        entry.expect("an entry").file_name().into_string().expect("a name of this test")
    });
    names.filter(|name| name.contains("out")).collect()
}

#[test]
fn the_file_holds_the_checkpoint() {
    for (untied, quant) in [(false, Quant::W4), (true, Quant::W8), (true, Quant::W4)] {
        let mut config = config();
        config["tie_word_embeddings"] = json!(!untied);
        config["text_config"]["tie_word_embeddings"] = json!(!untied);
        let folder = Tiny::new(config).write();
        let source = folder.open();
        let out = run(&folder, quant).expect("a converted file");
        verify(&out).expect("its hash");
        let read = Checkpoint::open(&out).expect("a converted file");
        read.check_values().expect("finite values");

        assert_eq!(read.quant, quant);
        assert_eq!(read.config_json, source.config_json);
        assert_eq!(read.sources(), source.sources());
        assert_eq!(read.metadata()["qdelta.version"], "6");
        assert_eq!(&read.attachment("tokenizer.json").expect("attached")[..], b"some text");
        assert_eq!(&read.attachment("empty").expect("attached")[..], b"");
        assert_eq!(&read.attachment("made").expect("attached")[..], b"a text");
        assert!(read.attachment("none").is_none());
        assert_eq!(read.specs(), source.specs());
        assert!(read.has_mtp() && read.has_vision());
        let head = if quant == Quant::W4 { "lm_head.w5_planes" } else { "lm_head.w8_planes" };
        assert_eq!(read.tensor(head).is_some(), untied);
        assert_eq!(read.listing().len(), source.specs().len());

        for spec in source.specs() {
            let from = source.tensor(&spec.name).expect("a source tensor");
            let storage = storage(quant, &HashMap::new(), spec, from.dtype).expect("a recipe");
            let to = read.tensor(&storage.name(spec)).expect("a converted tensor");
            match storage {
                Storage::AsIs => {
                    assert_eq!((to.dtype, &to.bytes[..]), (from.dtype, &from.bytes[..]));
                }
                Storage::F32 => {
                    assert_eq!(to.dtype.name(), "F32");
                    assert_eq!(to.to_f32(), from.to_f32());
                }
                Storage::Coded(format) => {
                    let (cols, values) = (spec.shape[1], from.to_f32());
                    let mut panel = vec![0; panel_bytes(format, cols)];
                    let panels = values.chunks(PANEL_ROWS * cols);
                    assert_eq!(to.bytes.len(), panels.len() * panel.len());
                    let mut rest = &to.bytes[..];
                    for plane in planes(format, cols) {
                        for rows in panels.clone() {
                            panel.fill(0);
                            encode_panel(format, rows, cols, None, &mut panel);
                            let (to, after) = rest.split_at(plane.len());
                            assert_eq!(panel[plane.clone()], *to, "{}", spec.name);
                            rest = after;
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn the_same_source_gives_the_same_bytes() {
    let folder = Tiny::default().write_shards(3);
    let mut files = Vec::new();
    for threads in [None, Some(1), Some(2), Some(5)] {
        let out = folder.path(OUT);
        run_to(&folder, Quant::W4, &out, threads).expect("a converted file");
        files.push(fs::read(&out).expect("the file"));
    }
    assert!(files.windows(2).all(|pair| pair[0] == pair[1]));
    let (header, data) = split(&files[0]);
    assert_eq!((files[0].len() - data.len()) % 4096, 0);
    for (name, entry) in header.as_object().expect("an object") {
        if name != "__metadata__" && !name.starts_with("padding.") {
            assert_eq!(entry["data_offsets"][0].as_u64().expect("an offset") % 64, 0, "{name}");
        }
    }
}

#[test]
fn progress_and_stop() {
    let folder = Tiny::default().write();
    let source = folder.open();
    let out = folder.path(OUT);
    let mut steps = Vec::new();
    convert(&source, Quant::W8, &out, &mut |done, total| {
        steps.push((done, total));
        true
    })
    .expect("a converted file");
    let total = steps[0].1;
    assert!(steps.iter().all(|step| step.1 == total));
    assert!(steps.is_sorted() && steps[0].0 == 0 && steps[steps.len() - 1].0 == total);
    fs::remove_file(&out).expect("the file");

    for stop in [1, 2, steps.len()] {
        let mut calls = 0;
        let result = convert(&source, Quant::W8, &out, &mut |_, _| {
            calls += 1;
            calls < stop
        });
        assert!(matches!(result, Err(Error::Interrupted)));
        assert_eq!(leftovers(&folder), [""; 0]);
    }
}

#[test]
fn what_may_be_replaced() {
    let folder = Tiny::default().write();
    let out = run(&folder, Quant::W8).expect("a converted file");
    run(&folder, Quant::W4).expect("another in its place");
    assert_eq!(Checkpoint::open(&out).expect("a converted file").quant, Quant::W4);

    // One that is damaged or of another version too.
    let bytes = fs::read(&out).expect("the file");
    fs::write(&out, &bytes[..3000]).expect("a file");
    run(&folder, Quant::W8).expect("another in its place");
    verify(&out).expect("a whole file");

    for taken in [FILE, "config.json"] {
        let before = fs::read(folder.path(taken)).expect("the file");
        let error = run_to(&folder, Quant::W4, &folder.path(taken), None).expect_err("taken");
        assert!(matches!(error, Error::Argument(_)));
        assert!(error.to_string().contains(taken), "{error}");
        assert_eq!(fs::read(folder.path(taken)).expect("the file"), before);
    }
    assert!(matches!(
        run_to(&folder, Quant::W4, &folder.path("none/a"), None),
        Err(Error::Io { .. })
    ));
}

#[test]
fn arguments() {
    let folder = Tiny::default().write();
    let error = run(&folder, Quant::None).expect_err("nothing to do");
    assert!(matches!(error, Error::Argument(_)));
    let out = run(&folder, Quant::W8).expect("a converted file");
    let converted = Checkpoint::open(&out).expect("a converted file");
    let error = convert(&converted, Quant::W4, &folder.path("b"), &mut |_, _| true);
    let error = error.expect_err("converted before").to_string();
    assert!(error.contains("already converted (w8)"), "{error}");
    for threads in [0, 1025] {
        let error = run_to(&folder, Quant::W8, &out, Some(threads)).expect_err("bad threads");
        assert_eq!(error.to_string(), format!("threads is {threads}, expected 1 to 1024"));
    }

    // Beside the checkpoint, the file does not count as one of its weights.
    let in_folder = Checkpoint::open(folder.root()).expect("the checkpoint");
    assert_eq!(in_folder.quant, Quant::None);
    fs::remove_file(folder.path(FILE)).expect("the file");
    assert!(folder.error().contains("a converted file, expected the checkpoint"));
}

#[test]
fn values_that_no_format_holds() {
    let name = format!("{TEXT}layers.0.mlp.gate_proj.weight");
    for (value, text) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (-70000.0, "-70000")] {
        let mut tiny = Tiny::default();
        let tensor = tiny.tensor(&name);
        let mut values = vec![0.5; 40 * 24];
        values[33 * 24 + 5] = value;
        *tensor = Stored::new(&name, "F32", &[40, 24], &values);
        let folder = tiny.write();
        let error = run(&folder, Quant::W4).expect_err("not storable").to_string();
        let start = format!("{FILE}: tensor `{name}`: row 33 holds {text}, expected numbers from ");
        assert!(error.starts_with(&start), "{error}");
        assert_eq!(leftovers(&folder), [""; 0]);
    }
    let mut tiny = Tiny::default();
    let tensor = tiny.tensor("model.language_model.layers.0.linear_attn.in_proj_a.weight");
    tensor.data = common::encode(&tensor.dtype, &[f32::NAN; 4 * 24]);
    assert!(run(&tiny.write(), Quant::W8).is_err());
}

#[test]
fn damage_is_found() {
    let folder = Tiny::default().write();
    let out = run(&folder, Quant::W8).expect("a converted file");
    let good = fs::read(&out).expect("the file");

    let mut bytes = good.clone();
    *bytes.last_mut().expect("some bytes") ^= 1;
    fs::write(&out, &bytes).expect("a file");
    let error = verify(&out).expect_err("damage").to_string();
    assert!(error.starts_with("out.safetensors: hash of the data is "), "{error}");

    let (header, data) = split(&good);
    let rewritten = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut header = header.clone();
        change(&mut header);
        // The data stays where it was.
        let length = good.len() - data.len() - 8;
        let header = format!("{:<length$}", header.to_string());
        fs::write(&out, join(&header, &data)).expect("a file");
        Checkpoint::open(&out).err().expect("a wrong header")
    };
    let error = rewritten(&|header| header["__metadata__"]["qdelta.version"] = json!("1"));
    assert!(matches!(error, Error::Unsupported(_)));
    assert!(error.to_string().contains("convert the checkpoint again"), "{error}");
    let up = "layers.0.mlp.up_proj.w8";
    let renamed = |name: &str| {
        rewritten(&|header| {
            let tensor = header[up].take();
            header.as_object_mut().expect("an object").remove(up);
            header[format!("layers.0.mlp.up_proj.{name}")] = tensor;
        })
    };
    let error = renamed("w3").to_string();
    assert!(error.ends_with("tensor `layers.0.mlp.up_proj.weight` is missing"), "{error}");
    let error = renamed("w4").to_string();
    assert!(error.ends_with("up_proj.w4`: shape [3, 1088], expected [3, 576]"), "{error}");
    let error = rewritten(&|header| header[up]["shape"] = json!([1, 3 * 1088]));
    assert_eq!(
        error.to_string(),
        format!("{OUT}: tensor `{up}`: shape [1, 3264], expected [3, 1088]")
    );
    let embedding = "embed_tokens.w8_planes";
    for shape in [json!([1, 2 * 1088]), json!([2, 576]), json!([2, 512]), json!([2 * 1088])] {
        let error = rewritten(&|header| header[embedding]["shape"] = shape.clone()).to_string();
        assert!(error.starts_with(&format!("{OUT}: tensor `{embedding}`: ")), "{error}");
    }
    let error = rewritten(&|header| header[up]["dtype"] = json!("I8"));
    assert_eq!(error.to_string(), format!("{OUT}: tensor `{up}`: dtype I8, expected U8"));

    // A header of another length moves all tensors.
    fs::write(&out, join(&(header.to_string() + " "), &data)).expect("a file");
    let error = Checkpoint::open(&out).err().expect("a moved tensor").to_string();
    assert!(error.contains("expected a multiple of 64"), "{error}");
}

#[test]
fn attachments_that_fail() {
    let folder = Tiny::default().write();
    let source = folder.open();
    let run = |attachments: &[(String, Attachment)]| {
        Job { attachments, ..Job::new(&source, Quant::W8) }
            .to_file(&folder.path(OUT), &mut |_, _| true)
            .expect_err("a wrong attachment")
    };
    let attach = |path: &str| ("a".to_owned(), Attachment::Path(folder.path(path)));
    assert!(matches!(run(&[attach("config.json"), attach("config.json")]), Error::Argument(_)));
    assert!(matches!(run(&[attach("none")]), Error::Io { .. }));
    assert_eq!(leftovers(&folder), [""; 0]);
}
