//! Programs that show how `dashinfer` is used; run one with `cargo run --release --example NAME`.
