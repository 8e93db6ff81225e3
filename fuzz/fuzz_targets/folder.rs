#![no_main]

#[path = "../../rust/core/tests/common/fuzz.rs"]
mod fuzz;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    fuzz::folder(data);
});
