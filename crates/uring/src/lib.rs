//! io_uring for the dataplane, and the only unsafe code of trimtab.
//!
//! A [`Ring`] belongs to one worker thread: submissions are queued, go to the kernel together in one
//! [`Ring::enter`], and come back as [`Completion`]s that carry the [`Token`] they were submitted with. Receives take
//! their memory from the ring's buffers ([`BufferPool`]), so that a thousand idle flows hold none.
//!
//! What makes the unsafe parts sound, and who upholds it:
//!
//! * *The kernel reads and writes buffer memory only while the ring exists.* The memory is owned by the ring, dropped
//!   after it, and not at all if operations were still in flight then ([`Ring`]'s `Drop` cancels and waits first).
//! * *Nobody reads a buffer that the kernel may write.* The pool knows for each buffer whether the kernel has it; giving
//!   back, sending or reading a buffer that one does not hold is refused.
//! * *A socket address or message lives until the kernel has copied it*, which is when its submission is consumed: they live in
//!   the ring until the next enter.
//! * *A descriptor is not closed under a queued submission*: closing goes through the same queue ([`Ring::close`]).
//!
//! Needs Linux 6.1 (`IORING_SETUP_DEFER_TASKRUN`; multishot receive is 6.0). Sources: `io_uring_setup(2)`,
//! `io_uring_enter(2)`, `io_uring_register(2)`, `io_uring_prep_recv_multishot(3)`, `io_uring_register_buf_ring(3)`.
#![allow(unsafe_code, reason = "this crate is where it lives; every block says why it is sound")]

mod buffers;
mod datagrams;
mod lent;
pub mod oneshot;
mod ring;
mod socket;
mod token;

pub use buffers::{BufferPool, Group, Memory};
pub use datagrams::{
    DATAGRAM_OVERHEAD, Datagrams, Local, Part, cut, receive_message, send_headed_message, send_message,
};
pub use lent::Lent;
pub use ring::{Completion, EnterError, Ring, Setup, SetupError, Wait};
pub use socket::{
    bind_address_no_port, defer_accept, fast_open, fast_open_connect, local_ports, receive_destination,
    receive_trains, sent_nothing_for, set_receive_low_water,
};
pub use token::{Op, Token};
