//! Blocks: the stored form of leaves, as compressed lines of canonical JSON.

use std::io::{Read as _, Write as _};

use anyhow::{Context, Result, ensure};
use flate2::Compression;
use flate2::read::ZlibDecoder;
use flate2::write::ZlibEncoder;

use super::BLOCK;

/// The largest size of a block's text, in bytes. An event with many outputs has a long leaf.
const TEXT_MAX: u64 = 1 << 30;

/// Compresses the texts of leaves.
///
/// # Errors
/// None: it writes to memory.
pub fn compress(leaves: &[String]) -> Result<Vec<u8>> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::fast());
    for leaf in leaves {
        encoder
            .write_all(leaf.as_bytes())
            .context("compress a leaf")?;
        encoder.write_all(b"\n").context("compress a leaf")?;
    }
    encoder.finish().context("compress leaves")
}

/// The texts of a block's leaves.
///
/// # Errors
/// The block is damaged.
pub fn decompress(block: &[u8]) -> Result<Vec<String>> {
    let mut text = String::new();
    let mut decoder = ZlibDecoder::new(block).take(TEXT_MAX);
    decoder
        .read_to_string(&mut text)
        .context("decompress leaves")?;
    let leaves: Vec<String> = text.lines().map(str::to_owned).collect();
    ensure!(leaves.len() <= BLOCK, "the block has too many leaves");
    Ok(leaves)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_read_as_it_was_written() {
        let leaves = vec!["{\"a\":1}".to_owned(), "{\"b\":\"\\n\u{2028}\"}".to_owned()];
        let block = compress(&leaves).unwrap();
        assert_eq!(decompress(&block).unwrap(), leaves);
        assert!(decompress(block.split_at(block.len() - 8).0).is_err());
        assert!(decompress(&compress(&vec![String::new(); BLOCK + 1]).unwrap()).is_err());
    }
}
