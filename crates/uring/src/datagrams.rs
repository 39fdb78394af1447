//! Datagrams: how they lie in a receive buffer, and what the kernel is told to send them.
//!
//! A multishot `recvmsg` puts four parts into a buffer (`io_uring_recvmsg_out`, `io_uring_prep_recvmsg_multishot(3)`): a header of
//! four numbers, the sender's address, control messages, the payload. The sizes of the second and third are those that the
//! submission asked for, whatever is in them.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::ring::write_address;

/// Room for a socket address: `sockaddr_in6` has 28 bytes; control messages behind it want to be aligned.
pub(crate) const NAME_BYTES: usize = 32;
/// Room for control messages: `UDP_GRO` takes 24 bytes, `IPV6_PKTINFO` 40.
pub(crate) const CONTROL_BYTES: usize = 64;
const HEADER_BYTES: usize = 16;
/// Where the payload starts.
const PAYLOAD_AT: usize = HEADER_BYTES + NAME_BYTES + CONTROL_BYTES;

/// Bytes that a buffer needs beside the payload of what [`crate::Ring::recv_datagrams`] receives.
pub const DATAGRAM_OVERHEAD: u32 = PAYLOAD_AT as u32;

/// What was received at once from one sender: a datagram, or a train of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Datagrams {
    /// Who sent them.
    pub from: SocketAddr,
    /// To which address, and on which interface it came; where the socket asks for it ([`crate::receive_destination`]).
    pub to: Option<Local>,
    /// Bytes of each datagram but the last; 0: it is one.
    pub segment: u32,
    /// Where in the buffer the payload starts.
    pub start: u32,
    /// Its bytes.
    pub length: u32,
}

/// An address of this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Local {
    /// The address.
    pub ip: IpAddr,
    /// The number of the interface, which link-local addresses need.
    pub interface: u32,
}

/// A part of a held buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Which buffer.
    pub buffer: u16,
    /// Where in it.
    pub start: u32,
    /// How many bytes.
    pub length: u32,
}

/// The datagrams of a train of these parts, each with a part of its own. Every part but the last is whole datagrams of
/// `segment` bytes (0: all of them are one datagram).
pub fn cut(parts: &[Part], segment: u32) -> impl Iterator<Item = Part> {
    parts.iter().flat_map(move |part| {
        let Part { buffer, start, length } = *part;
        let step = if segment == 0 { length.max(1) } else { segment };
        (0..length.div_ceil(step)).map(move |n| Part {
            buffer,
            start: start + n * step,
            length: step.min(length - n * step),
        })
    })
}

/// What is sent for a train whose datagrams have a header each, in order: `None` stands for the header. An empty datagram is a
/// header alone.
pub(crate) fn headed(parts: &[Part], segment: u32) -> impl Iterator<Item = Option<Part>> {
    let one = segment == 0;
    let first = one.then_some(None);
    first.into_iter().chain(cut(parts, segment).flat_map(move |part| {
        let header = (!one).then_some(None);
        header.into_iter().chain(std::iter::once(Some(part)))
    }))
}

/// What the kernel must be told to cut such a train by.
pub(crate) const fn headed_segment(segment: u32, header: &[u8]) -> u32 {
    if segment == 0 { 0 } else { segment + header.len() as u32 }
}

/// Reads what a completion left in a buffer. `None`: it is cut off, or from no internet address.
pub(crate) fn parse(bytes: &[u8]) -> Option<Datagrams> {
    let number = |at: usize| Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk::<4>()?));
    let (name, control, payload, flags) = (number(0)?, number(4)?, number(8)?, number(12)?);
    if flags & libc::MSG_TRUNC as u32 != 0 || bytes.len() != PAYLOAD_AT + payload as usize {
        return None;
    }
    let name = bytes.get(HEADER_BYTES..)?.get(..NAME_BYTES.min(name as usize))?;
    let control = bytes.get(HEADER_BYTES + NAME_BYTES..)?.get(..CONTROL_BYTES.min(control as usize))?;
    let mut datagrams = Datagrams {
        from: read_address(name)?,
        to: None,
        segment: 0,
        start: PAYLOAD_AT as u32,
        length: payload,
    };
    for_each_control(control, |level, kind, data| match (level, kind) {
        (libc::SOL_UDP, libc::UDP_GRO) => {
            datagrams.segment = data.first_chunk().map_or(0, |size| i32::from_ne_bytes(*size)).max(0) as u32;
        }
        // struct in_pktinfo: interface, local address, address in the packet.
        (libc::IPPROTO_IP, libc::IP_PKTINFO) if data.len() >= 12 => {
            let interface = u32::from_ne_bytes([data[0], data[1], data[2], data[3]]);
            let ip = Ipv4Addr::new(data[8], data[9], data[10], data[11]).into();
            datagrams.to = Some(Local { ip, interface });
        }
        // struct in6_pktinfo: address, interface.
        (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) if data.len() >= 20 => {
            let interface = u32::from_ne_bytes([data[16], data[17], data[18], data[19]]);
            let ip = data.first_chunk::<16>().map(|octets| Ipv6Addr::from(*octets).into());
            datagrams.to = ip.map(|ip| Local { ip, interface });
        }
        _ => {}
    });
    Some(datagrams)
}

/// Control messages, as the kernel reads them: aligned.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(8))]
pub(crate) struct Control {
    bytes: [u8; CONTROL_BYTES],
    used: usize,
}

impl Control {
    /// For a train of datagrams of `segment` bytes (0: it is one) from `from`.
    pub(crate) fn new(segment: u32, from: Option<Local>) -> Self {
        let mut control = Self { bytes: [0; CONTROL_BYTES], used: 0 };
        if let Ok(segment @ 1..) = u16::try_from(segment) {
            control.put(libc::SOL_UDP, libc::UDP_SEGMENT, &segment.to_ne_bytes());
        }
        match from {
            Some(Local { ip: IpAddr::V4(v4), .. }) => {
                // The interface is left to the routes, as for any packet from this address.
                let mut info = [0; 12];
                info[4..8].copy_from_slice(&v4.octets());
                control.put(libc::IPPROTO_IP, libc::IP_PKTINFO, &info);
            }
            Some(Local { ip: IpAddr::V6(v6), interface }) => {
                let mut info = [0; 20];
                info[..16].copy_from_slice(&v6.octets());
                if v6.is_unicast_link_local() {
                    info[16..].copy_from_slice(&interface.to_ne_bytes());
                }
                control.put(libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, &info);
            }
            None => {}
        }
        control
    }

    fn put(&mut self, level: i32, kind: i32, data: &[u8]) {
        let length = CONTROL_HEADER + data.len();
        let place = &mut self.bytes[self.used..self.used + length];
        place[..size_of::<usize>()].copy_from_slice(&length.to_ne_bytes());
        place[size_of::<usize>()..][..4].copy_from_slice(&level.to_ne_bytes());
        place[size_of::<usize>() + 4..][..4].copy_from_slice(&kind.to_ne_bytes());
        place[CONTROL_HEADER..].copy_from_slice(data);
        self.used += length.next_multiple_of(size_of::<usize>());
    }

    /// Its address and how many bytes of it are used.
    pub(crate) fn raw(&self) -> (*const u8, usize) {
        (self.bytes.as_ptr(), self.used)
    }
}

/// `struct cmsghdr`: length, level, type (`cmsg(3)`).
const CONTROL_HEADER: usize = size_of::<libc::cmsghdr>();

fn for_each_control(mut control: &[u8], mut each: impl FnMut(i32, i32, &[u8])) {
    const LENGTH: usize = size_of::<usize>();
    while let Some(length) = control.first_chunk::<LENGTH>().map(|bytes| usize::from_ne_bytes(*bytes)) {
        let Some(message) = control.get(..length).filter(|_| length >= CONTROL_HEADER) else { return };
        let int =
            |at: usize| i32::from_ne_bytes([message[at], message[at + 1], message[at + 2], message[at + 3]]);
        each(int(LENGTH), int(LENGTH + 4), &message[CONTROL_HEADER..]);
        control = control.get(length.next_multiple_of(LENGTH)..).unwrap_or_default();
    }
}

/// Reads a `sockaddr_in` or `sockaddr_in6`.
fn read_address(name: &[u8]) -> Option<SocketAddr> {
    let family = u16::from_ne_bytes(*name.first_chunk()?);
    let port = u16::from_be_bytes(*name.get(2..)?.first_chunk()?);
    match i32::from(family) {
        libc::AF_INET => {
            let ip = Ipv4Addr::from(*name.get(4..)?.first_chunk::<4>()?);
            Some(SocketAddrV4::new(ip, port).into())
        }
        libc::AF_INET6 => {
            let ip = Ipv6Addr::from(*name.get(8..)?.first_chunk::<16>()?);
            let scope = u32::from_ne_bytes(*name.get(24..)?.first_chunk()?);
            // The flow label of a packet says nothing about the peer.
            Some(SocketAddrV6::new(ip, port, 0, scope).into())
        }
        _ => None,
    }
}

/// Receives what waits on a socket, without waiting, and leaves it in the buffer as a multishot `recvmsg` would; for engines that
/// have none. Gives the result of the completion.
///
/// # Errors
/// As `recvmsg(2)`.
pub fn receive_message(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<i32> {
    let Some((front, payload)) = buffer.split_at_mut_checked(PAYLOAD_AT) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let mut part = libc::iovec { iov_base: payload.as_mut_ptr().cast(), iov_len: payload.len() };
    let (header, rest) = front.split_at_mut(HEADER_BYTES);
    let (name, control) = rest.split_at_mut(NAME_BYTES);
    // SAFETY: msghdr is a C struct of integers and pointers, for which all zeroes is a value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_name = name.as_mut_ptr().cast();
    message.msg_namelen = name.len() as libc::socklen_t;
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = control.len() as _;
    // SAFETY: every pointer in the message is to memory that is borrowed here, with its length.
    let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
    let length = u32::try_from(received).map_err(|_| io::Error::last_os_error())?;
    let numbers = [message.msg_namelen, message.msg_controllen as u32, length, message.msg_flags as u32];
    for (place, number) in header.chunks_exact_mut(4).zip(numbers) {
        place.copy_from_slice(&number.to_ne_bytes());
    }
    Ok((PAYLOAD_AT + length as usize) as i32)
}

/// Sends the parts as [`crate::Ring::send_datagrams`] does, at once; for engines that have no sends of their own.
///
/// # Errors
/// As `sendmsg(2)`.
pub fn send_message<'a>(
    socket: BorrowedFd<'_>,
    (to, from): (Option<&SocketAddr>, Option<Local>),
    parts: impl Iterator<Item = &'a [u8]>,
    segment: u32,
) -> io::Result<usize> {
    let mut messages = Messages::new();
    let parts = parts.map(|part| (part.as_ptr(), part.len() as u32));
    let message = messages.message(to, Control::new(segment, from), parts);
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the message and all that it points to are in `messages` and in the borrowed parts until the call returns.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), message, flags) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Sends the parts as [`crate::Ring::send_headed`] does, at once; for engines that have no sends of their own. `bytes` gives a
/// part's.
///
/// # Errors
/// As `sendmsg(2)`.
pub fn send_headed_message<'a>(
    socket: BorrowedFd<'_>,
    header: &'a [u8],
    parts: &[Part],
    segment: u32,
    bytes: impl Fn(Part) -> &'a [u8],
) -> io::Result<usize> {
    let pieces = headed(parts, segment).map(|piece| piece.map_or(header, &bytes));
    send_message(socket, (None, None), pieces, headed_segment(segment, header))
}

/// What queued sends of datagrams point to. The kernel has read all of it when it has taken the submission: datagrams are sent
/// at once or not at all (`MSG_DONTWAIT`), and never wait inside it.
#[derive(Debug)]
pub(crate) struct Messages {
    headers: Vec<libc::msghdr>,
    controls: Vec<Control>,
    addresses: Vec<libc::sockaddr_storage>,
    parts: Vec<libc::iovec>,
    /// What is sent before datagrams and is in no buffer.
    prefixes: Vec<u8>,
}

// SAFETY: the pointers in it are into its own memory and into the buffers of the ring that owns it; nothing of them is bound to
// a thread.
unsafe impl Send for Messages {}

/// Sends that may be queued; beyond it the queue is handed over.
const MESSAGES_MAX: usize = 512;
/// Parts of them.
const PARTS_MAX: usize = 4_096;
/// Bytes that are in no buffer: as many as the largest datagram.
const PREFIX_BYTES_MAX: usize = 64 * 1_024;

impl Messages {
    /// No memory before the first send: who has no datagrams pays nothing.
    pub(crate) const fn new() -> Self {
        Self {
            headers: Vec::new(),
            controls: Vec::new(),
            addresses: Vec::new(),
            parts: Vec::new(),
            prefixes: Vec::new(),
        }
    }

    /// Whether a send of so many parts must wait until the queue is handed over.
    pub(crate) fn is_full(&self, parts: usize) -> bool {
        self.addresses.len() >= MESSAGES_MAX
            || self.headers.len() >= MESSAGES_MAX
            || self.parts.len() + parts > PARTS_MAX
    }

    /// Whether a send with so many bytes of its own must wait until the queue is handed over.
    pub(crate) fn is_full_of_prefixes(&self, bytes: usize) -> bool {
        self.prefixes.len() + bytes > PREFIX_BYTES_MAX
    }

    /// Keeps bytes until [`Messages::clear`].
    ///
    /// # Panics
    /// If there is no room; see [`Messages::is_full_of_prefixes`].
    pub(crate) fn prefix(&mut self, bytes: &[u8]) -> (*const u8, u32) {
        // They must not move: it never grows beyond what it reserves at first.
        assert!(!self.is_full_of_prefixes(bytes.len()), "no room for {} bytes", bytes.len());
        self.prefixes.reserve_exact(PREFIX_BYTES_MAX - self.prefixes.len());
        let at = self.prefixes.len();
        self.prefixes.extend_from_slice(bytes);
        (self.prefixes[at..].as_ptr(), bytes.len() as u32)
    }

    /// The kernel has read it all.
    pub(crate) fn clear(&mut self) {
        self.headers.clear();
        self.controls.clear();
        self.addresses.clear();
        self.parts.clear();
        self.prefixes.clear();
    }

    /// Keeps an address until [`Messages::clear`].
    pub(crate) fn address(&mut self, address: &SocketAddr) -> (*const libc::sockaddr, libc::socklen_t) {
        // SAFETY: sockaddr_storage is a C struct of integers, for which all zeroes is a value (AF_UNSPEC).
        let zeroed: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
        let place = push(&mut self.addresses, MESSAGES_MAX, zeroed);
        let length = write_address(place, address);
        (std::ptr::from_ref(place).cast(), length)
    }

    /// Keeps a message until [`Messages::clear`].
    pub(crate) fn message(
        &mut self,
        to: Option<&SocketAddr>,
        control: Control,
        parts: impl Iterator<Item = (*const u8, u32)>,
    ) -> *const libc::msghdr {
        let (name, name_length) = to.map_or((std::ptr::null(), 0), |to| self.address(to));
        let first = self.parts.len();
        self.parts.reserve_exact(PARTS_MAX - first);
        self.parts.extend(parts.map(|(address, length)| libc::iovec {
            iov_base: address.cast_mut().cast(),
            iov_len: length as usize,
        }));
        let count = self.parts.len() - first;
        let control = push(&mut self.controls, MESSAGES_MAX, control);
        let (control, control_length) = control.raw();
        // SAFETY: msghdr is a C struct of integers and pointers, for which all zeroes is a value.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        header.msg_name = name.cast_mut().cast();
        header.msg_namelen = name_length;
        header.msg_iov = self.parts.as_mut_ptr().wrapping_add(first);
        header.msg_iovlen = count as _;
        header.msg_control =
            if control_length == 0 { std::ptr::null_mut() } else { control.cast_mut().cast() };
        header.msg_controllen = control_length as _;
        push(&mut self.headers, MESSAGES_MAX, header)
    }
}

/// Adds to a vector whose elements must not move: it never grows beyond what it reserves at first.
fn push<T>(to: &mut Vec<T>, most: usize, value: T) -> &mut T {
    to.reserve_exact(most - to.len());
    let place = to.len();
    to.push(value);
    &mut to[place]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_messages_are_read_as_they_are_written() {
        let v4 = Local { ip: "192.0.2.7".parse().unwrap(), interface: 3 };
        let v6 = Local { ip: "fe80::7".parse().unwrap(), interface: 3 };
        for (segment, from) in [(1_200, Some(v4)), (1_200, Some(v6)), (0, Some(v6)), (1_200, None), (0, None)]
        {
            let control = Control::new(segment, from);
            let mut seen = Vec::new();
            for_each_control(&control.bytes[..control.used], |level, kind, data| {
                seen.push((level, kind, data.to_vec()));
            });
            let segments: Vec<_> = seen.iter().filter(|(level, ..)| *level == libc::SOL_UDP).collect();
            assert_eq!(segments.len(), usize::from(segment != 0));
            assert!(
                segments
                    .iter()
                    .all(|(_, kind, data)| *kind == libc::UDP_SEGMENT && *data == 1_200_u16.to_ne_bytes())
            );
            assert_eq!(seen.len() - segments.len(), usize::from(from.is_some()));
        }
    }

    #[test]
    fn nothing_in_a_buffer_is_trusted() {
        let mut buffer = vec![0; PAYLOAD_AT + 3];
        buffer[0..4].copy_from_slice(&16_u32.to_ne_bytes());
        buffer[8..12].copy_from_slice(&3_u32.to_ne_bytes());
        assert_eq!(parse(&buffer), None, "no family");
        buffer[16..18].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
        buffer[18..20].copy_from_slice(&53_u16.to_be_bytes());
        buffer[20..24].copy_from_slice(&[192, 0, 2, 1]);
        let parsed = parse(&buffer).unwrap();
        assert_eq!((parsed.from, parsed.to, parsed.length), ("192.0.2.1:53".parse().unwrap(), None, 3));
        assert_eq!(parse(&buffer[..PAYLOAD_AT + 2]), None, "cut off");
        for length in [0_usize, 15, 17, 1_000, usize::MAX] {
            buffer[4..8].copy_from_slice(&64_u32.to_ne_bytes());
            buffer[48..56].copy_from_slice(&length.to_ne_bytes());
            assert!(parse(&buffer).is_some());
        }
        buffer[12..16].copy_from_slice(&(libc::MSG_TRUNC as u32).to_ne_bytes());
        assert_eq!(parse(&buffer), None, "cut off by the kernel");
    }
}
