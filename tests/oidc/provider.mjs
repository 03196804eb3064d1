// A certified OpenID Connect provider with four users, for tests of the console.
//
// Usage: node provider.mjs FOLDER ISSUER REDIRECT_URL, with the npm package oidc-provider in
// FOLDER/node_modules. It serves the issuer's port of 127.0.0.1. The login page takes any password.
import { generateKeyPairSync } from 'node:crypto';
import { createServer } from 'node:http';
import path from 'node:path';
import { pathToFileURL } from 'node:url';

const [folder, issuer, redirect] = process.argv.slice(2);
const library = path.join(folder, 'node_modules/oidc-provider/lib/index.js');
const { default: Provider } = await import(pathToFileURL(library));

const users = {
  vera: { groups: ['staff'], name: 'Vera' },
  olga: { groups: ['staff', 'on-call'], name: 'Olga', email: 'olga@example.com', email_verified: true },
  dora: { groups: ['platform'], name: 'Dora' },
  // She chose another's name, and is in a group without a role.
  nina: { groups: ['visitors'], name: 'host', email: 'olga@example.com', email_verified: false },
};

const { privateKey } = generateKeyPairSync('rsa', { modulusLength: 2048 });
const provider = new Provider(issuer, {
  clients: [{
    client_id: 'oncely',
    client_secret: 'a secret+of/the:console',
    redirect_uris: [redirect],
    response_types: ['code'],
    grant_types: ['authorization_code'],
  }],
  jwks: { keys: [{ ...privateKey.export({ format: 'jwk' }), kid: 'first', use: 'sig', alg: 'RS256' }] },
  claims: { openid: ['sub'], email: ['email', 'email_verified'], profile: ['name'], groups: ['groups'] },
  scopes: ['openid', 'email', 'profile', 'groups'],
  pkce: { required: () => true },
  cookies: { keys: ['test'] },
  features: { devInteractions: { enabled: true } },
  findAccount: (_, id) => users[id] && { accountId: id, claims: () => ({ sub: id, ...users[id] }) },
});
createServer(provider.callback()).listen(new URL(issuer).port, '127.0.0.1');
