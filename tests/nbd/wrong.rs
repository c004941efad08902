//! What a server of the protocol can do wrong.

/// What it does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wrong {
    /// A greeting that is none.
    Greeting,
    /// Ends in the middle of the greeting.
    ShortGreeting,
    /// A reply to an option that was not sent.
    OptionReply,
    /// A reply to an option that is gigabytes long.
    LongOptionReply,
    /// Contexts without an end.
    Contexts,
    /// Information without an end.
    Information,
    /// The export is not there, and others without an end are.
    Exports,
    /// An export that is longer than a file can be.
    Size,
    /// Blocks of three bytes.
    Blocks,
    /// Replies with another magic number.
    Magic,
    /// Replies to a request that was not sent.
    Cookie,
    /// A simple reply to a read.
    Simple,
    /// A chunk that is longer than what was asked for.
    LongChunk,
    /// A chunk of data before what was asked for.
    OtherPlace,
    /// The same data twice.
    Twice,
    /// Less data than was asked for, and no more to come.
    Less,
    /// A chunk of another type.
    Type,
    /// An empty chunk, and more to come, without an end.
    Empty,
    /// Ends in the middle of the data.
    ShortData,
    /// Block status that is gigabytes long.
    LongStatus,
    /// Block status of no length.
    NoStatus,
    /// Block status of another context.
    Context,
    /// An error with a message longer than itself.
    Message,
    /// An error, as there may be one: with a message, and where it was.
    Refuses,
    /// Extended headers: a reply to another offset than was asked for.
    Offset,
    /// A chunk that is said to have exabytes.
    HugeChunk,
    /// Runs in another number than is said.
    Count,
    /// Block status as it is without extended headers.
    OldStatus,
    /// Replies without extended headers.
    OldHeader,
}

/// All of it.
pub const WRONG: &[Wrong] = &[
    Wrong::Greeting,
    Wrong::ShortGreeting,
    Wrong::OptionReply,
    Wrong::LongOptionReply,
    Wrong::Contexts,
    Wrong::Information,
    Wrong::Exports,
    Wrong::Size,
    Wrong::Blocks,
    Wrong::Magic,
    Wrong::Cookie,
    Wrong::Simple,
    Wrong::LongChunk,
    Wrong::OtherPlace,
    Wrong::Twice,
    Wrong::Less,
    Wrong::Type,
    Wrong::Empty,
    Wrong::ShortData,
    Wrong::LongStatus,
    Wrong::NoStatus,
    Wrong::Context,
    Wrong::Message,
    Wrong::Refuses,
];

/// What only servers with extended headers can do wrong.
pub const WRONG_EXTENDED: &[Wrong] =
    &[Wrong::Offset, Wrong::HugeChunk, Wrong::Count, Wrong::OldStatus, Wrong::OldHeader];
