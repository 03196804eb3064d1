//! Archives of expired inbox and outbox rows: files with one JSON object per line, compressed with
//! gzip.

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

/// How many chunks may wait for compression.
const CHUNKS_MAX: usize = 64;

/// An archive that is being written on a blocking thread. Its name ends in `.partial` until it is
/// complete and synced to disk. A dropped archive keeps that name.
pub(super) struct ArchiveFile {
    chunks: mpsc::Sender<Bytes>,
    writer: JoinHandle<anyhow::Result<()>>,
}

impl ArchiveFile {
    /// Creates an archive for rows of `table` up to a time. Replaces an archive of the same name.
    pub(super) fn create(folder: &Path, table: &str, until: Timestamp) -> Self {
        let time = until.strftime("%Y-%m-%dT%H-%M-%S.%6fZ");
        let path = folder.join(format!("{table}-{time}.jsonl.gz"));
        let (chunks, received) = mpsc::channel(CHUNKS_MAX);
        let writer = tokio::task::spawn_blocking(move || {
            write(&path, received).with_context(|| format!("write the archive {}", path.display()))
        });
        ArchiveFile { chunks, writer }
    }

    /// Appends whole lines.
    pub(super) async fn add(&self, lines: Bytes) {
        // `finish` returns the error of a writer that ended early.
        let _ = self.chunks.send(lines).await;
    }

    /// Waits until the archive is synced to disk and has its name.
    ///
    /// # Errors
    /// `Unavailable` if writing failed.
    pub(super) async fn finish(self) -> Result<()> {
        // An empty chunk ends the archive.
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
            // The archive was dropped.
            None => return Ok(()),
        }
    }
    file.finish()?.sync_all()?;
    std::fs::rename(&partial, path)?;
    File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()?;
    Ok(())
}
