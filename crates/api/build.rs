//! Compiles `proto/` in pure Rust: no `protoc` on the machine that builds.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::{env, fs};

/// Relative to `proto/`; what they import is found from there.
const FILES: [&str; 5] = [
    "trimtab/control/v1/registration.proto",
    "trimtab/control/v1/admin.proto",
    "trimtab/control/v1/probe.proto",
    "xds/data/orca/v3/orca_load_report.proto",
    "xds/service/orca/v3/orca.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../proto");
    println!("cargo:rerun-if-changed={}", root.display());
    for file in FILES {
        println!("cargo:rerun-if-changed={}", root.join(file).display());
    }
    let mut compiler = protox::Compiler::new([&root])?;
    compiler.include_imports(true).include_source_info(true).open_files(FILES)?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    // What reflection serves: the imports with it, or a client could not resolve the message types.
    fs::write(out.join("descriptors.bin"), compiler.encode_file_descriptor_set())?;
    tonic_prost_build::configure()
        .build_client(true)
        .build_server(true)
        // Sorted as the registry keeps them, and with no hash for each of ten keys in each of thousands of reports.
        .btree_map(".xds.data.orca.v3")
        .compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}
