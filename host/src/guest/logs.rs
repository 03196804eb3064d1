//! Log output of a guest, bounded in size.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use tokio::io::AsyncWrite;
use wasmtime_wasi::cli::{IsTerminal, StdoutStream};

/// Log lines, standard output and standard error of one call. Beyond the limit, output is dropped
/// and counted, so endless output costs no memory.
#[derive(Clone)]
pub(super) struct Logs {
    inner: Arc<Mutex<Inner>>,
}

struct Inner {
    text: String,
    remaining: usize,
    dropped: usize,
}

impl Logs {
    pub fn new(limit: usize) -> Self {
        Logs {
            inner: Arc::new(Mutex::new(Inner {
                text: String::new(),
                remaining: limit,
                dropped: 0,
            })),
        }
    }

    /// Resets the buffer for the next call of the same instance.
    pub fn reset(&self, limit: usize) {
        *self.inner.lock().unwrap_or_else(PoisonError::into_inner) = Inner {
            text: String::new(),
            remaining: limit,
            dropped: 0,
        };
    }

    /// Adds one line. Line breaks within it are escaped, so one entry cannot pose as two.
    pub fn append_line(&self, level: &str, context: &str, message: &str) {
        // Lines beyond the limit are dropped before they are copied.
        if self.drop_if_over_limit(context.len() + message.len()) {
            return;
        }
        let message = message.trim_end_matches('\n').replace('\n', "\\n");
        if context.is_empty() {
            self.append(&format!("{level}: {message}\n"));
        } else {
            self.append(&format!("{level} {}: {message}\n", context.escape_debug()));
        }
    }

    /// Whether a text of this length exceeds the limit. Counts it as dropped in that case.
    fn drop_if_over_limit(&self, length: usize) -> bool {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let drops = length > inner.remaining;
        if drops {
            inner.dropped += length;
        }
        drops
    }

    fn append(&self, text: &str) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if text.len() > inner.remaining {
            inner.dropped += text.len();
            return;
        }
        inner.remaining -= text.len();
        inner.text.push_str(text);
    }

    /// Returns the kept output, with a last line that counts the dropped bytes.
    pub fn take(&self) -> String {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let mut text = std::mem::take(&mut inner.text);
        if inner.dropped > 0 {
            text.push_str(&format!("({} more bytes dropped)\n", inner.dropped));
        }
        // Control characters must not reach terminals and databases.
        text.chars()
            .filter(|c| *c == '\n' || *c == '\t' || !c.is_control())
            .collect()
    }
}

impl IsTerminal for Logs {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl StdoutStream for Logs {
    fn async_stream(&self) -> Box<dyn AsyncWrite + Send + Sync> {
        Box::new(self.clone())
    }
}

impl AsyncWrite for Logs {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if !self.drop_if_over_limit(bytes.len()) {
            self.append(&String::from_utf8_lossy(bytes));
        }
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
