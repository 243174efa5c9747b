//! One launcher for each kernel: it checks shapes, and is the only place that launches it.
