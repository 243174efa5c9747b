//! Benchmarks of dashinfer, and what they compare with: the limits of the machine and the memory of the process.

pub mod arguments;
pub mod limits;
pub mod machine;
pub mod naive;
pub mod rss;
pub mod table;
pub mod work;
