//! Projects made by `oncely new`, built without a network.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::guests;
use crate::world::World;

/// A project in its own folder.
pub struct Project {
    pub folder: PathBuf,
    environment: Vec<(String, String)>,
}

impl Project {
    /// Makes the project `name` in the folder of `world`. Its crates are built in `target`.
    pub async fn new(world: &World, name: &str, language: &str, target: &Path) -> Result<Self> {
        let made = world.oncely(&["new", name, "--lang", language]).await?;
        ensure!(made.contains(&format!("cd {name}")), "{made}");
        let folder = world.folder.path().join(name);
        if folder.join("package.json").exists() {
            // `npm install` without a network
            guests::link_npm_packages(&folder, &folder.join("oncely"))?;
        }
        let mut environment = vec![
            ("PATH".to_owned(), guests::tools_path()),
            ("CARGO_TARGET_DIR".to_owned(), target.display().to_string()),
        ];
        if folder.join("go.mod").exists() {
            let flags = guests::go_flags(&folder, &folder.with_extension("mod"))?;
            environment.push(("GOFLAGS".to_owned(), flags));
        }
        Ok(Project {
            folder,
            environment,
        })
    }

    /// Sets a variable in the environment of all commands.
    pub fn set(&mut self, variable: &str, value: &Path) {
        let value = value.display().to_string();
        self.environment.push((variable.to_owned(), value));
    }

    /// A command in the project's folder with the tools of its language.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new(program.as_ref());
        command
            .current_dir(&self.folder)
            .envs(self.environment.iter().cloned())
            .env("NO_COLOR", "1");
        command
    }

    /// Runs `oncely` in the project's folder and returns its output.
    pub async fn oncely(&self, arguments: &[&str]) -> Result<String> {
        let mut command = self.command(guests::oncely()?);
        command.args(arguments);
        run(command).await
    }

    /// Replaces text in a file of the project that contains it.
    pub fn edit(&self, file: &str, old: &str, new: &str) -> Result<()> {
        let path = self.folder.join(file);
        let text =
            std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        ensure!(text.contains(old), "{} has no `{old}`", path.display());
        std::fs::write(&path, text.replace(old, new))
            .with_context(|| format!("write {}", path.display()))
    }
}

/// Runs a command and returns its output. An error has what the command said.
pub async fn run(mut command: Command) -> Result<String> {
    let output = tokio::task::spawn_blocking(move || command.output()).await??;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success(),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(said)
}
