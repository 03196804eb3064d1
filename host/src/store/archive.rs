//! What leaves inbox and outbox, in files: each row as JSON on a line of its own, compressed with gzip.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use jiff::Timestamp;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::{Result, StoreError};

/// How many chunks wait to be compressed.
const CHUNKS_MAX: usize = 64;

/// A file that is being written, off the async threads. It has its name once it is whole and on the disk; until then, and when
/// it is dropped, it is one that ends in `.partial`.
pub(super) struct ArchiveFile {
    chunks: mpsc::Sender<Bytes>,
    writer: JoinHandle<anyhow::Result<()>>,
}

impl ArchiveFile {
    /// A file for rows of `table` up to a time. One of the same name is replaced.
    pub(super) fn create(folder: &Path, table: &str, until: Timestamp) -> Self {
        let time = until.strftime("%Y-%m-%dT%H-%M-%S.%6fZ");
        let path = folder.join(format!("{table}-{time}.jsonl.gz"));
        let (chunks, received) = mpsc::channel(CHUNKS_MAX);
        let writer = tokio::task::spawn_blocking(move || {
            write(&path, received).with_context(|| format!("write the archive {}", path.display()))
        });
        ArchiveFile { chunks, writer }
    }

    /// Adds whole lines.
    pub(super) async fn add(&self, lines: Bytes) {
        // Why the writer ended is told at the end.
        let _ = self.chunks.send(lines).await;
    }

    /// Waits until all is on the disk.
    pub(super) async fn finish(self) -> Result<()> {
        // Nothing is one chunk that says that there was no more.
        let _ = self.chunks.send(Bytes::new()).await;
        drop(self.chunks);
        let written = self
            .writer
            .await
            .map_err(|error| StoreError::Unavailable(anyhow!(error)))?;
        written.map_err(StoreError::Unavailable)
    }
}

fn write(path: &Path, mut chunks: mpsc::Receiver<Bytes>) -> anyhow::Result<()> {
    let partial = PathBuf::from(format!("{}.partial", path.display()));
    let mut file = GzEncoder::new(File::create(&partial)?, Compression::fast());
    loop {
        match chunks.blocking_recv() {
            Some(chunk) if chunk.is_empty() => break,
            Some(chunk) => file.write_all(&chunk)?,
            // Whoever had the rows gave up.
            None => return Ok(()),
        }
    }
    file.finish()?.sync_all()?;
    std::fs::rename(&partial, path)?;
    File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()?;
    Ok(())
}
