//! GGUF files that are damaged or malicious: an error that names the place, or a valid file; never
//! a panic, and no memory by a number that a file states.

mod common;

use common::gguf::{ARRAY, File, I32, Row, TEXT, Typed, U32, array, f32, i32s, string, text, u32};
use qdelta_core::Result;
use qdelta_core::files::gguf::{Gguf, Value, header_bytes};
use qdelta_core::model::checkpoint::Checkpoint;
use qdelta_core::tensor::Bytes;

/// A file whose parts are few, to be changed byte by byte.
fn small() -> File {
    let row = |name: &str, dims: &[u64], kind: u32, bytes: usize| Row {
        name: name.to_owned(),
        dims: dims.to_vec(),
        kind,
        data: vec![1; bytes],
        offset: None,
    };
    File {
        version: 3,
        entries: vec![
            ("general.alignment".to_owned(), u32(8)),
            ("t".to_owned(), array(TEXT, 2, &[string("a"), string("bc")].concat())),
            ("n".to_owned(), i32s(&[1, 2])),
        ],
        rows: vec![row("a", &[3, 2], 0, 24), row("b", &[32], 8, 34), row("c", &[0], 1, 0)],
        alignment: 8,
    }
}

/// Reads all that a file offers.
fn read(bytes: Vec<u8>) -> Result<()> {
    let gguf = Gguf::read(Bytes::from(bytes), "a.gguf")?;
    for key in gguf.metadata.keys() {
        if let Ok(Some(Value::Array(array))) = gguf.metadata.get(key) {
            array.iter().for_each(drop);
        }
    }
    gguf.tensors.iter().for_each(|tensor| drop(tensor.bytes.to_vec()));
    Ok(())
}

fn refused(bytes: Vec<u8>) -> String {
    let error = read(bytes).expect_err("a hostile file").to_string();
    assert!(error.starts_with("a.gguf: ") && error.len() < 500, "{error}");
    error
}

#[test]
fn every_truncation_is_an_error() {
    let good = small().bytes();
    read(good.clone()).expect("a valid file");
    for n in 0..good.len() {
        refused(good[..n].to_vec());
    }
}

#[test]
fn headers_are_whole_or_more_is_needed() {
    let good = small().bytes();
    let header = good.len() - [24, 34usize.next_multiple_of(8)].iter().sum::<usize>();
    for n in 0..=good.len() {
        let start = Bytes::from(good[..n].to_vec());
        let found = header_bytes(&start, good.len() as u64, "a.gguf").expect("a valid start");
        // Behind the table come fewer bytes than the alignment has.
        assert!(found.is_none_or(|bytes| bytes <= n && (header - 8..=header).contains(&bytes)));
        assert!(found.is_some() || n < header, "{n}");
        // Of a file that ends here it is damaged.
        let whole = header_bytes(&start, n as u64, "a.gguf");
        assert_eq!(whole.is_ok(), found.is_some(), "{n}");
    }
}

#[test]
fn every_changed_byte() {
    let good = small().bytes();
    for at in 0..good.len() {
        for value in 0..=u8::MAX {
            let mut bytes = good.clone();
            bytes[at] = value;
            let _ = read(bytes);
        }
    }
}

#[test]
fn truncations_and_changes_of_a_model() {
    let whole = File::model(&common::text_config(), None);
    let open = |bytes: &[u8]| {
        Gguf::read(Bytes::from(bytes.to_vec()), "a.gguf").and_then(Checkpoint::from_gguf)
    };
    let good = whole.bytes();
    open(&good).expect("a valid file");
    let data: usize = whole.rows.iter().map(|row| row.data.len()).sum();
    for n in (0..good.len()).step_by(97).chain(good.len() - 9..good.len()) {
        let error = open(&good[..n]).err().expect("a truncated file").to_string();
        assert!(error.starts_with("a.gguf: "), "{n}: {error}");
    }
    for at in 0..good.len() - data {
        for change in [1, 0x80, 0xff, 0x20] {
            let mut bytes = good.clone();
            bytes[at] ^= change;
            if let Ok(checkpoint) = open(&bytes) {
                let _ = checkpoint.check_values();
            }
        }
    }
}

/// Files with one lie, of the kinds that broke readers of this format.
#[test]
fn one_lie() {
    let huge = [1 << 20, 1 << 31, 1 << 32, 1 << 61, 1 << 62, 1 << 63, u64::MAX - 7, u64::MAX];
    for n in huge {
        // Counts, and lengths of strings, before anything is allocated for them.
        for at in [8, 16, 24] {
            let mut bytes = small().bytes();
            bytes[at..at + 8].copy_from_slice(&n.to_le_bytes());
            assert!(refused(bytes).contains("left"), "{n} at {at}");
        }
        for kind in [0, 2, 4, 7, 8, 10, 12] {
            let mut file = small();
            file.set("n", array(kind, n, &[0; 64]));
            assert!(refused(file.bytes()).contains("`n`: an array of"), "{kind}");
        }
        let mut file = small();
        file.set("t", Typed(TEXT, [&n.to_le_bytes()[..], b"abc"].concat()));
        assert!(refused(file.bytes()).contains("bytes expected at byte"));
        let mut file = small();
        file.set("t", array(TEXT, 1, &n.to_le_bytes()));
        assert!(refused(file.bytes()).contains("bytes expected at byte"));
        // Sizes whose product wraps to something small, or lies outside.
        for (dims, kind) in [
            (vec![n], 0),
            (vec![n, 1], 0),
            (vec![1, n], 1),
            (vec![1 << 32, n], 0),
            (vec![1 << 32, 1 << 32, n, 1], 30),
            (vec![n, n, n, n], 0),
            (vec![2, 1 << 63], 0),
            (vec![0, n, u64::MAX, n], 0),
            (vec![32, n], 8),
            (vec![256, n], 12),
            (vec![n & !255, 3], 14),
        ] {
            let mut file = small();
            let row = file.row("a");
            (row.dims, row.kind) = (dims.clone(), kind);
            let error = refused(file.bytes());
            assert!(error.contains("tensor `a`: "), "{dims:?}: {error}");
        }
        // Offsets beyond the file, and such that offset and size wrap.
        for offset in [n, n & !31, u64::MAX - 31, 96u64.wrapping_sub(n) & !31] {
            let mut file = small();
            file.row("a").offset = Some(offset);
            let error = refused(file.bytes());
            assert!(error.contains("tensor `a`: "), "{offset}: {error}");
        }
    }
}

#[test]
fn arrays_of_arrays() {
    let mut file = small();
    let inner = array(U32, 1, &[0; 4]).1;
    file.set("n", array(ARRAY, 1, &inner));
    assert!(refused(file.bytes()).contains("`n`: an array of arrays"));
    // As deep as a file goes.
    let deep = [&ARRAY.to_le_bytes()[..], &1u64.to_le_bytes()].concat().repeat(100_000);
    file.set("n", Typed(ARRAY, deep));
    assert!(refused(file.bytes()).contains("`n`: an array of arrays"));
}

#[test]
fn types_that_do_not_exist() {
    for kind in [13, 14, 255, 1 << 31, u32::MAX] {
        let mut file = small();
        file.set("n", Typed(kind, vec![0; 64]));
        assert!(refused(file.bytes()).contains(&format!("of the unknown type {kind}")));
        file.set("n", array(kind, 1, &[0; 64]));
        assert!(refused(file.bytes()).contains(&format!("of the unknown type {kind}")));
    }
    for kind in [4, 5, 31, 36, 43, 1 << 31, u32::MAX] {
        let mut file = small();
        file.row("a").kind = kind;
        assert!(refused(file.bytes()).ends_with(&format!("`a`: the unknown type {kind}")));
    }
}

#[test]
fn dimensions() {
    for n in [5, 6, 255, 1 << 20, u32::MAX] {
        let good = small();
        let mut bytes = good.bytes();
        // Behind the table's first name.
        let name = bytes.windows(9).position(|w| w == string("a")).expect("the name");
        let at = bytes[name + 9..]
            .windows(12)
            .position(|w| w == [&2u32.to_le_bytes()[..], &3u64.to_le_bytes()].concat());
        let at = name + 9 + at.expect("two dimensions");
        bytes[at..at + 4].copy_from_slice(&n.to_le_bytes());
        assert!(refused(bytes).contains(&format!("{n} dimensions, expected at most 4")));
    }
    let mut file = small();
    file.row("a").dims = vec![6, 1, 1, 1];
    read(file.bytes()).expect("four dimensions");
    file.row("a").dims = vec![];
    read(file.bytes()).expect("a scalar");
    file.row("b").dims = vec![];
    assert!(refused(file.bytes()).contains("rows of 1, expected a multiple of 32 for Q8_0"));
    file.row("b").dims = vec![33];
    assert!(refused(file.bytes()).contains("rows of 33, expected a multiple of 32 for Q8_0"));
}

#[test]
fn alignments() {
    for n in [0, 3, 24, 1 << 21, 1 << 31, u32::MAX] {
        let mut file = small();
        file.set("general.alignment", u32(n));
        assert!(refused(file.bytes()).contains(&format!("is {n}, expected a power of two")));
    }
    for value in
        [text("32"), f32(32.0), Typed(I32, (-32i32).to_le_bytes().to_vec()), array(U32, 1, &[0; 4])]
    {
        let mut file = small();
        file.set("general.alignment", value);
        assert!(refused(file.bytes()).contains("expected a count"));
    }
    let mut file = small();
    file.row("b").offset = Some(28);
    assert!(refused(file.bytes()).ends_with("begins at 28, expected a multiple of 8"));
    // The data would start behind the end.
    let mut file = small();
    file.rows.clear();
    file.set("general.alignment", u32(1 << 20));
    read(file.bytes()).expect("no data, no tensors");
    let mut file = small();
    file.set("general.alignment", u32(1 << 20));
    assert!(refused(file.bytes()).contains("the file has 0 bytes of data"));
}

#[test]
fn tensors_that_overlap() {
    for (offset, fine) in [(0, false), (16, false), (24, true)] {
        let mut file = small();
        file.row("b").offset = Some(offset);
        file.add("end", "a");
        file.row("end").offset = Some(64);
        let result = read(file.bytes());
        assert_eq!(result.is_ok(), fine, "{offset}");
        if let Err(error) = result {
            let error = error.to_string();
            assert!(error.ends_with("inside the tensor that ends at 24"), "{error}");
        }
    }
    // Nothing lies nowhere in particular.
    let mut file = small();
    file.row("c").offset = Some(0);
    read(file.bytes()).expect("an empty tensor");
}

#[test]
fn names() {
    let mut file = small();
    file.entries.push(("n".to_owned(), u32(1)));
    assert!(refused(file.bytes()).contains("key `n` is there twice"));
    let mut file = small();
    file.row("b").name = "a".to_owned();
    assert!(refused(file.bytes()).ends_with("tensor `a`: named twice"));

    let long = "x".repeat(1 << 16);
    let mut file = small();
    (file.row("a").name, file.entries[1].0) = (long.clone(), long.clone());
    read(file.bytes()).expect("long names");
    file.rows[0].dims = vec![1 << 40];
    assert!(refused(file.bytes()).contains("xxx…`: "));
    file.rows[0].name = format!("{long}x");
    assert!(refused(file.bytes()).contains("is no UTF-8 text of at most 65536 bytes"));

    let good = small().bytes();
    let name = good.windows(9).position(|w| w == string("b")).expect("the name");
    let mut bytes = good.clone();
    bytes[name + 8] = 0xff;
    assert!(refused(bytes).contains("is no UTF-8 text"));
}
