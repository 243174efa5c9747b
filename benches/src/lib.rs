//! Benchmarks of dashinfer.
