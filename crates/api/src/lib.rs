//! trimtab's wire: the types generated from `proto/` and nothing else.
//!
//! Owns the message types, clients and servers of `trimtab.control.v1` ([`v1`]) the ORCA load report ([`orca`]), and
//! the service that streams it ([`orca_service`]).
//! Owns no meaning: what a message says is parsed, and validated, where it is received. The comments are in `proto/`.
#![forbid(unsafe_code)]

pub use generated::trimtab::control::v1;
pub use generated::xds::data::orca::v3 as orca;
pub use generated::xds::service::orca::v3 as orca_service;

/// Nested as the packages are: generated code names types of other packages relative to its own.
#[allow(
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    clippy::all,
    clippy::allow_attributes_without_reason,
    clippy::or_fun_call,
    clippy::use_self,
    reason = "generated code"
)]
mod generated {
    pub mod trimtab {
        pub mod control {
            pub mod v1 {
                include!(concat!(env!("OUT_DIR"), "/trimtab.control.v1.rs"));
            }
        }
    }
    pub mod xds {
        pub mod data {
            pub mod orca {
                pub mod v3 {
                    include!(concat!(env!("OUT_DIR"), "/xds.data.orca.v3.rs"));
                }
            }
        }
        pub mod service {
            pub mod orca {
                pub mod v3 {
                    include!(concat!(env!("OUT_DIR"), "/xds.service.orca.v3.rs"));
                }
            }
        }
    }
}

/// All of `proto/` and what it imports, encoded as a `google.protobuf.FileDescriptorSet`: for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
