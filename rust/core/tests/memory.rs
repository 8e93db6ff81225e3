//! What a model and its sessions allocate, beside what was planned.

use qdelta_core::Error;
use qdelta_core::config::Config;
use qdelta_core::layers::head::Head;
use qdelta_core::model::Model;
use qdelta_core::model::checkpoint::Checkpoint;
use qdelta_core::model::forward::Rows;
use qdelta_core::model::options::Options;
use qdelta_core::model::synthetic::Synthetic;
use qdelta_core::quant::Quant;
use qdelta_core::session::Session;
use qdelta_core::state::KvFormat;
use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Counts the bytes of the heap.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all calls go to the system's allocator, which keeps the contract.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise; the pointer came from the system's allocator.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// One test at a time allocates.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes that `work` allocates at its peak, and what it returns.
fn allocated<T>(work: impl FnOnce() -> T) -> (usize, T) {
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let result = work();
    (PEAK.load(Ordering::Relaxed) - before, result)
}

fn assert_within_5_percent(found: usize, planned: usize, what: &str) {
    let off = found as f64 / planned as f64 - 1.0;
    assert!(off.abs() < 0.05, "{what}: allocated {found}, planned {planned}, {off:+.3}");
}

fn demo(options: Options) -> qdelta_core::Result<Arc<Model>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../python/qdelta/demo");
    Model::load(Arc::new(Checkpoint::open(&folder)?), options).map(Arc::new)
}

/// A model with the proportions of the 4B and a few of its layers.
fn synthetic(quant: Quant, options: Options) -> Arc<Model> {
    let json = r#"{"model_type": "qwen3_5_text", "hidden_size": 1280, "num_hidden_layers": 4,
        "intermediate_size": 4608, "num_attention_heads": 8, "num_key_value_heads": 2,
        "head_dim": 256, "vocab_size": 32000, "linear_num_key_heads": 8,
        "linear_num_value_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "tie_word_embeddings": false, "rope_parameters": {"rope_theta": 10000000,
        "partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10]}}"#;
    let config = Config::from_json(json, "config.json").expect("a valid config");
    let source = Arc::new(Synthetic::new(&config, quant, 1).expect("memory"));
    Arc::new(Model::new(config, quant, source, options).expect("valid options"))
}

fn options(context: usize) -> Options {
    Options { context: Some(context), threads: Some(2), ..Options::default() }
}

fn tokens(n: usize) -> Vec<i32> {
    (0..n as i32).map(|i| i * 7 % 1000).collect()
}

/// Fills a session in pieces of growing length, and holds it against the plan.
fn check_session(model: &Arc<Model>, what: &str) {
    let n = model.context;
    let (bytes, session) = allocated(|| {
        let mut session = Session::new(model.clone()).expect("no limit");
        session.feed(&tokens(1), Rows::Last).expect("room");
        session.feed(&tokens(10), Rows::None).expect("room");
        session.reset();
        session.feed(&tokens(n - 3), Rows::Last).expect("room");
        session.candidates(20, 1000, &[], &[]).expect("logits");
        session.feed(&tokens(3), Rows::Last).expect("room");
        session.candidates(20, 1000, &[], &[]).expect("logits");
        session
    });
    assert_within_5_percent(bytes, model.memory_plan(n).session(), what);
    let held = model.memory_plan(n).total();
    assert_eq!(model.budget().held(), held, "{what}: held with a session");
    drop(session);
    assert_eq!(model.budget().held(), model.memory_plan(n).weights, "{what}: held without");
}

#[test]
fn sessions_take_what_is_planned() {
    let _alone = alone();
    for kv in [None, Some(KvFormat::Q8)] {
        let model = demo(Options { kv, ..options(2048) }).expect("the demo");
        check_session(&model, &format!("demo, {kv:?}"));
        for (quant, head) in
            [(Quant::None, Head::Full), (Quant::W4, Head::Full), (Quant::W8, Head::Screened)]
        {
            let model = synthetic(quant, Options { kv, head, ..options(700) });
            check_session(&model, &format!("{quant}, {kv:?}, {head:?}"));
        }
    }
    check_session(&synthetic(Quant::W4, options(100)), "a context shorter than a piece");
}

#[test]
fn weights_take_what_is_planned() {
    let _alone = alone();
    for quant in [Quant::None, Quant::W4, Quant::W8] {
        let (bytes, model) = allocated(|| synthetic(quant, options(1)));
        assert_within_5_percent(bytes, model.memory_plan(1).weights, &quant.to_string());
    }
}

#[test]
fn snapshots_hold_their_states_and_share_the_cache() {
    let _alone = alone();
    let model = demo(options(1024)).expect("the demo");
    let plan = model.memory_plan(1024);
    let chunk = model.memory_plan(256).kv;
    let mut session = Session::new(model.clone()).expect("no limit");
    session.feed(&tokens(300), Rows::None).expect("room");
    let alone = model.budget().held();
    assert_eq!(alone, plan.weights + plan.state + plan.scratch + 2 * chunk);
    let snapshot = session.snapshot().expect("no limit");
    assert_eq!(model.budget().held(), alone + plan.state);
    assert_eq!(snapshot.bytes(), plan.state + 2 * chunk + 4 * 300);
    // The second chunk is written while shared, so there are two of it; the first stays shared.
    session.feed(&tokens(1), Rows::None).expect("room");
    assert_eq!(model.budget().held(), alone + plan.state + chunk);
    session.restore(&snapshot).expect("its model");
    assert_eq!(model.budget().held(), alone + plan.state);
    session.reset();
    assert_eq!(model.budget().held(), alone + plan.state);
    drop(snapshot);
    assert_eq!(model.budget().held(), alone - 2 * chunk);
}

#[test]
fn nothing_is_taken_beyond_the_limit() {
    let _alone = alone();
    let plan = demo(options(2048)).expect("the demo").memory_plan(2048);
    let limit = plan.total() + plan.state + plan.scratch;
    let model = demo(Options { memory_limit: Some(limit), ..options(2048) }).expect("it fits");
    let mut first = Session::new(model.clone()).expect("room");
    let mut second = Session::new(model.clone()).expect("room");
    first.feed(&tokens(1500), Rows::Last).expect("room");
    second.feed(&tokens(300), Rows::Last).expect("room");
    let held = model.budget().held();
    // All that is left is two chunks of the cache in each head.
    let (bytes, result) = allocated(|| second.feed(&tokens(600), Rows::Last));
    assert!(matches!(result, Err(Error::MemoryLimit { limit: l, .. }) if l == limit));
    assert!(bytes < 20_000, "{bytes} bytes were allocated before the refusal");
    assert_eq!((model.budget().held(), second.tokens().len()), (held, 300));
    let (bytes, result) = allocated(|| Session::new(model.clone()).map(drop));
    assert!(matches!(result, Err(Error::MemoryLimit { .. })) && bytes < 20_000);
    assert!(matches!(first.feed(&tokens(500), Rows::All), Err(Error::MemoryLimit { .. })));
    // What the refusals left alone goes on.
    second.feed(&tokens(200), Rows::Last).expect("room in the last chunk");
    drop(first);
    second.feed(&tokens(1500), Rows::Last).expect("the room of the other");
    assert!(model.budget().held() <= limit);
}

#[test]
fn all_rows_of_logits_are_held_too() {
    let _alone = alone();
    let model = demo(options(1024)).expect("the demo");
    let mut session = Session::new(model.clone()).expect("no limit");
    session.feed(&tokens(100), Rows::Last).expect("room");
    let before = model.budget().held();
    let (bytes, ()) = allocated(|| session.feed(&tokens(500), Rows::All).expect("room"));
    // Two chunks of the cache come with them, and work buffers that were held before.
    let held = model.budget().held() - before;
    assert!(held > 499 * 4 * model.config.vocab_size);
    let limit = held + model.memory_plan(1024).scratch;
    assert!(bytes > held * 9 / 10 && bytes < limit, "{bytes} bytes for {held}, {limit}");
}
