//! A session that runs many statements per round trip, each in its own rolled-back transaction.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, bail};

pub struct Session {
    stream: UnixStream,
    out: Vec<u8>,
    incoming: Vec<u8>,
    read: usize,
}

/// The result of a statement.
#[derive(Debug, Default)]
pub struct StatementResult {
    /// The command tag of the server.
    pub tag: Option<String>,
    /// SQLSTATE and message.
    pub error: Option<(String, String)>,
    /// Transaction status: `T`, `E`, or `I` for none.
    pub status: u8,
    /// A setting that the server reported as changed.
    pub setting: Option<String>,
}

impl Session {
    pub fn open(socket: &Path, role: &str, database: &str) -> Result<Self> {
        let stream = UnixStream::connect(socket).context("connect to the server's socket")?;
        let mut session = Session {
            stream,
            out: Vec::new(),
            incoming: Vec::new(),
            read: 0,
        };
        let mut startup = 196_608_u32.to_be_bytes().to_vec();
        for text in [
            "user",
            role,
            "database",
            database,
            "client_encoding",
            "UTF8",
        ] {
            startup.extend_from_slice(text.as_bytes());
            startup.push(0);
        }
        startup.push(0);
        session
            .out
            .extend_from_slice(&(u32::try_from(startup.len() + 4)?).to_be_bytes());
        session.out.extend_from_slice(&startup);
        session.flush()?;
        session.cycle()?;
        session.message(b'P', &[b"begin\0begin read write\0", &[0, 0]]);
        session.message(b'P', &[b"rollback\0rollback\0", &[0, 0]]);
        session.message(b'S', &[]);
        session.flush()?;
        match session.cycle()?.error {
            None => Ok(session),
            Some((code, message)) => bail!("prepare a session: {code} {message}"),
        }
    }

    /// Queues a statement; all its placeholders are null.
    pub fn send(&mut self, statement: &str, placeholders: usize) {
        self.execute(b"begin\0");
        self.message(b'P', &[&[0], statement.as_bytes(), &[0], &[0, 0]]);
        let count = u16::try_from(placeholders).unwrap_or_default();
        let nulls = (-1_i32).to_be_bytes().repeat(usize::from(count));
        self.message(
            b'B',
            &[&[0, 0], &[0, 0], &count.to_be_bytes(), &nulls, &[0, 0]],
        );
        self.message(b'E', &[&[0], &[0, 0, 0, 0]]);
        self.message(b'S', &[]);
        self.execute(b"rollback\0");
        self.message(b'S', &[]);
    }

    /// Sends the `count` queued statements and returns their results.
    pub fn answers(&mut self, count: usize) -> Result<Vec<StatementResult>> {
        self.flush()?;
        let mut answers = Vec::with_capacity(count);
        for _ in 0..count {
            answers.push(self.cycle()?);
            self.cycle()?;
        }
        Ok(answers)
    }

    fn execute(&mut self, name: &[u8]) {
        self.message(b'B', &[&[0], name, &[0, 0], &[0, 0], &[0, 0]]);
        self.message(b'E', &[&[0], &[0, 0, 0, 0]]);
    }

    fn message(&mut self, kind: u8, parts: &[&[u8]]) {
        let length: usize = parts.iter().map(|part| part.len()).sum::<usize>() + 4;
        self.out.push(kind);
        self.out
            .extend_from_slice(&u32::try_from(length).unwrap_or_default().to_be_bytes());
        parts
            .iter()
            .for_each(|part| self.out.extend_from_slice(part));
    }

    fn flush(&mut self) -> Result<()> {
        self.stream
            .write_all(&self.out)
            .context("send to the server")?;
        self.out.clear();
        Ok(())
    }

    /// Reads to the next `ReadyForQuery`.
    fn cycle(&mut self) -> Result<StatementResult> {
        let mut ended = StatementResult::default();
        loop {
            let (kind, body) = self.next()?;
            match kind {
                b'Z' => {
                    ended.status = body.first().copied().unwrap_or_default();
                    return Ok(ended);
                }
                // The tag of `begin` comes first.
                b'C' => ended.tag = Some(text(&body)),
                b'I' => ended.tag = Some("nothing".to_owned()),
                b'E' => ended.error = Some(error(&body)),
                b'S' => ended.setting = Some(text(&body)),
                _ => {}
            }
        }
    }

    fn next(&mut self) -> Result<(u8, Vec<u8>)> {
        loop {
            let rest = &self.incoming[self.read..];
            if let [kind, a, b, c, d, body @ ..] = rest {
                let length = u32::from_be_bytes([*a, *b, *c, *d]) as usize - 4;
                if body.len() >= length {
                    let message = (*kind, body[..length].to_vec());
                    self.read += length + 5;
                    return Ok(message);
                }
            }
            self.incoming.drain(..self.read);
            self.read = 0;
            let mut chunk = [0; 65_536];
            match self
                .stream
                .read(&mut chunk)
                .context("read from the server")?
            {
                0 => bail!("the server closed the session"),
                length => self.incoming.extend_from_slice(&chunk[..length]),
            }
        }
    }
}

fn text(body: &[u8]) -> String {
    let end = body
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(body.len());
    String::from_utf8_lossy(&body[..end]).into_owned()
}

fn error(body: &[u8]) -> (String, String) {
    let mut fields = body.split(|byte| *byte == 0);
    let mut field = |kind: u8| {
        let found = fields.find(|field| field.first() == Some(&kind));
        found
            .map(|field| String::from_utf8_lossy(&field[1..]).into_owned())
            .unwrap_or_default()
    };
    // The order in which the server sends the fields.
    (field(b'C'), field(b'M'))
}
